//! The ledger: the hash of every page, and with it the fingerprint of the database.
//!
//! On disk it is a file of 8 bytes a page (little-endian, page 1 first), the *base*; in memory it is an *overlay* of what
//! has changed since. The overlay is part of the saved state (see [`super::state`]) and goes into the base only after a
//! state that holds it is durable. So base and overlay together are right after a crash at any moment: whatever part
//! of the overlay had reached the base, the overlay of the saved state covers it.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::format::{lock_page, page_hash};

/// When the overlay has so many entries it is time to fold it into the base: 16 bytes each in memory.
pub const FOLD_AT_ENTRIES: usize = 8192;

const ENTRY_LEN: u64 = 8;
/// Of a base that is checked, the hashes of so many pages are in memory at a time.
const READ_PAGES: u32 = 1 << 16;

/// Hashes of the pages 1 to `known_pages`, and the fingerprint over them.
#[derive(Debug)]
pub struct Ledger {
    base: File,
    overlay: BTreeMap<u32, u64>,
    page_size: u32,
    size_pages: u32,
    known_pages: u32,
    fingerprint: u64,
    zero_page: Vec<u8>,
}

impl Ledger {
    /// A ledger that knows nothing of a database of `size_pages` pages yet; what the file held is discarded.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn create(path: &Path, page_size: u32, size_pages: u32) -> io::Result<Self> {
        let base = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Self::with(base, page_size, size_pages, 0, 0, BTreeMap::new()))
    }

    /// The ledger of a saved state, which knows every page. Its hashes must give the state's fingerprint: from a base that is another
    /// one or damaged, each change of a wrong entry would make a wrong fingerprint, and no restore believes that.
    ///
    /// # Errors
    /// As the operating system answers; when the hashes do not give the fingerprint.
    pub fn open(
        path: &Path,
        page_size: u32,
        size_pages: u32,
        fingerprint: u64,
        overlay: BTreeMap<u32, u64>,
    ) -> io::Result<Self> {
        let base = File::options().read(true).write(true).open(path)?;
        let ledger = Self::with(base, page_size, size_pages, size_pages, fingerprint, overlay);
        if ledger.sum()? != fingerprint {
            let what = "the ledger is not the one that the local state was saved with";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(ledger)
    }

    /// The fingerprint that the hashes give.
    fn sum(&self) -> io::Result<u64> {
        let mut sum = 0;
        for first_page in (1..=self.size_pages).step_by(READ_PAGES as usize) {
            let page_count = READ_PAGES.min(self.size_pages - first_page + 1);
            sum = self.hashes(first_page, page_count)?.iter().fold(sum, |sum, hash| sum ^ hash);
        }
        Ok(sum)
    }

    fn with(
        base: File,
        page_size: u32,
        size_pages: u32,
        known_pages: u32,
        fingerprint: u64,
        overlay: BTreeMap<u32, u64>,
    ) -> Self {
        Self { base, overlay, page_size, size_pages, known_pages, fingerprint, zero_page: vec![0; page_size as usize] }
    }

    /// Size of the database in pages.
    #[must_use]
    pub fn size_pages(&self) -> u32 {
        self.size_pages
    }

    /// How many pages are known, from page 1 on.
    #[must_use]
    pub fn known_pages(&self) -> u32 {
        self.known_pages
    }

    /// The fingerprint, once every page is known.
    #[must_use]
    pub fn fingerprint(&self) -> Option<u64> {
        (self.known_pages == self.size_pages).then_some(self.fingerprint)
    }

    /// What has changed since the base was written.
    #[must_use]
    pub fn overlay(&self) -> &BTreeMap<u32, u64> {
        &self.overlay
    }

    /// The hash of a known page.
    ///
    /// # Errors
    /// As the operating system answers; a base that is too short is an error.
    pub fn get(&self, page_number: u32) -> io::Result<u64> {
        if let Some(&hash) = self.overlay.get(&page_number) {
            return Ok(hash);
        }
        let mut entry = [0; ENTRY_LEN as usize];
        self.base.read_exact_at(&mut entry, u64::from(page_number - 1) * ENTRY_LEN)?;
        Ok(u64::from_le_bytes(entry))
    }

    /// The hashes of `page_count` known pages from `first_page` on, in order; 0 for the lock page.
    ///
    /// # Errors
    /// As the operating system answers; a base that is too short is an error.
    pub fn hashes(&self, first_page: u32, page_count: u32) -> io::Result<Vec<u64>> {
        let pages = first_page..first_page.saturating_add(page_count);
        let changed: Vec<(u32, u64)> = self.overlay.range(pages.clone()).map(|(&page, &hash)| (page, hash)).collect();
        let lock_page = lock_page(self.page_size);
        // The last pages may never have been folded into the base: then they are in the overlay, all but the lock page.
        let is_unfolded = |page: &u32| *page == lock_page || self.overlay.contains_key(page);
        let unfolded = pages.clone().rev().take_while(is_unfolded).count();
        let mut base = vec![0; (page_count as usize - unfolded) * ENTRY_LEN as usize];
        self.base.read_exact_at(&mut base, u64::from(first_page - 1) * ENTRY_LEN)?;
        let mut hashes: Vec<u64> = base.as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry)).collect();
        hashes.resize(page_count as usize, 0);
        for (page_number, hash) in changed {
            hashes[(page_number - first_page) as usize] = hash;
        }
        if pages.contains(&lock_page) {
            hashes[(lock_page - first_page) as usize] = 0;
        }
        Ok(hashes)
    }

    /// Takes in a page that was read while nothing changed; pages come in ascending order.
    pub fn learn(&mut self, page_number: u32, image: &[u8]) {
        if page_number == self.known_pages + 1 {
            self.known_pages = page_number;
            if page_number != lock_page(self.page_size) {
                let hash = page_hash(page_number, image);
                self.overlay.insert(page_number, hash);
                self.fingerprint ^= hash;
            }
        }
    }

    /// Takes in a transaction: the size after it, and its pages (ascending) with their hashes. Gives the hashes that these pages
    /// had before; `None` of those that were not there or are not known yet.
    ///
    /// # Errors
    /// As the operating system answers. The ledger is then not to be used any more.
    pub fn apply(&mut self, size_pages: u32, pages: &[(u32, u64)]) -> io::Result<Vec<Option<u64>>> {
        let was_complete = self.known_pages == self.size_pages;
        let old_size_pages = self.size_pages;
        for page_number in size_pages.saturating_add(1)..=self.known_pages {
            self.forget(page_number)?;
        }
        self.known_pages = self.known_pages.min(size_pages);
        let mut former_hashes = vec![None; pages.len()];
        for (&(page_number, hash), former_hash) in pages.iter().zip(&mut former_hashes) {
            if page_number <= self.known_pages && page_number != lock_page(self.page_size) {
                let former = self.get(page_number)?;
                self.fingerprint ^= former ^ hash;
                self.overlay.insert(page_number, hash);
                *former_hash = Some(former);
            }
        }
        self.size_pages = size_pages;
        if was_complete {
            self.grow(old_size_pages, pages);
        }
        Ok(former_hashes)
    }

    fn forget(&mut self, page_number: u32) -> io::Result<()> {
        if page_number != lock_page(self.page_size) {
            self.fingerprint ^= self.get(page_number)?;
            self.overlay.remove(&page_number);
        }
        Ok(())
    }

    /// A complete ledger stays complete: pages that the transaction added are in it, or count as zeros.
    fn grow(&mut self, old_size_pages: u32, pages: &[(u32, u64)]) {
        for &(page_number, hash) in pages.iter().filter(|&&(page_number, _)| page_number > old_size_pages) {
            self.overlay.insert(page_number, hash);
            self.fingerprint ^= hash;
        }
        let added = pages.iter().filter(|&&(page_number, _)| page_number > old_size_pages).count() as u64;
        if u64::from(self.size_pages.saturating_sub(old_size_pages)) != added {
            let given: HashSet<u32> = pages.iter().map(|&(page_number, _)| page_number).collect();
            for page_number in old_size_pages + 1..=self.size_pages {
                if !given.contains(&page_number) && page_number != lock_page(self.page_size) {
                    let hash = page_hash(page_number, &self.zero_page);
                    self.overlay.insert(page_number, hash);
                    self.fingerprint ^= hash;
                }
            }
        }
        self.known_pages = self.size_pages;
    }

    /// Whether `image` is what the ledger knows of a page.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn matches(&self, page_number: u32, image: &[u8]) -> io::Result<bool> {
        Ok(page_number == lock_page(self.page_size) || self.get(page_number)? == page_hash(page_number, image))
    }

    /// Moves the overlay into the base. Call it only when a durable state holds the overlay, or none relies on the base,
    /// and [`Ledger::sync`] before the next state is saved.
    ///
    /// # Errors
    /// As the operating system answers; the overlay stays.
    pub fn fold(&mut self) -> io::Result<()> {
        let mut entries = self.overlay.iter().peekable();
        // Runs of neighbours go in one write.
        while let Some((&first, hash)) = entries.next() {
            let mut run = hash.to_le_bytes().to_vec();
            let mut last = first;
            while let Some((&next, hash)) = entries.next_if(|&(&next, _)| next == last + 1) {
                run.extend_from_slice(&hash.to_le_bytes());
                last = next;
            }
            self.base.write_all_at(&run, u64::from(first - 1) * ENTRY_LEN)?;
        }
        self.overlay.clear();
        Ok(())
    }

    /// Makes the base durable.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn sync(&self) -> io::Result<()> {
        self.base.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE_SIZE: u32 = 512;

    fn image(fill: u8) -> Vec<u8> {
        vec![fill; PAGE_SIZE as usize]
    }

    fn fingerprint(images: &[u8]) -> u64 {
        (1..).zip(images).fold(0, |sum, (number, &fill)| sum ^ page_hash(number, &image(fill)))
    }

    fn change(pages: &[(u32, u8)]) -> Vec<(u32, u64)> {
        pages.iter().map(|&(number, fill)| (number, page_hash(number, &image(fill)))).collect()
    }

    #[test]
    fn follows_changes_growth_and_shrinking() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::create(&directory.path().join("ledger"), PAGE_SIZE, 3).unwrap();
        ledger.learn(1, &image(1));
        // Page 3 is not known yet: its change is not taken in, page 1's is.
        ledger.apply(3, &change(&[(1, 9), (3, 7)])).unwrap();
        assert_eq!(ledger.fingerprint(), None);
        ledger.learn(2, &image(2));
        ledger.learn(3, &image(7));
        assert_eq!(ledger.fingerprint(), Some(fingerprint(&[9, 2, 7])));
        ledger.fold().unwrap();
        // Page 5 is never written: it counts as zeros.
        ledger.apply(6, &change(&[(2, 3), (4, 4), (6, 6)])).unwrap();
        assert_eq!(ledger.fingerprint(), Some(fingerprint(&[9, 3, 7, 4, 0, 6])));
        ledger.apply(2, &change(&[(1, 1)])).unwrap();
        assert_eq!(ledger.fingerprint(), Some(fingerprint(&[1, 3])));
        ledger.apply(4, &change(&[(3, 5), (4, 5)])).unwrap();
        assert_eq!(ledger.fingerprint(), Some(fingerprint(&[1, 3, 5, 5])));
        assert!(ledger.matches(3, &image(5)).unwrap());
        assert!(!ledger.matches(3, &image(7)).unwrap());
        // Pages 1 and 2 are in the base, all in the overlay.
        let known: Vec<u64> = change(&[(1, 1), (2, 3), (3, 5), (4, 5)]).into_iter().map(|(_, hash)| hash).collect();
        assert_eq!(ledger.hashes(1, 4).unwrap(), known);
        assert_eq!(ledger.hashes(2, 2).unwrap(), known[1..3]);
        ledger.fold().unwrap();
        ledger.apply(5, &change(&[(2, 8), (5, 5)])).unwrap();
        assert_eq!(ledger.hashes(2, 4).unwrap(), [change(&[(2, 8)])[0].1, known[2], known[3], change(&[(5, 5)])[0].1]);
        assert!(ledger.hashes(5, 2).is_err(), "page 6 is not known");
    }

    #[test]
    fn grows_over_the_lock_page() {
        let page_size = 65_536;
        let lock_page = lock_page(page_size);
        let base = tempfile::tempfile().unwrap();
        base.set_len(u64::from(lock_page - 2) * ENTRY_LEN).unwrap();
        let mut ledger = Ledger::with(base, page_size, lock_page - 2, lock_page - 2, 0, BTreeMap::new());
        let added = [(lock_page - 1, 5), (lock_page + 1, 6), (lock_page + 2, 7)];
        ledger.apply(lock_page + 2, &added).unwrap();
        assert_eq!(ledger.fingerprint(), Some(5 ^ 6 ^ 7));
        for _ in 0..2 {
            assert_eq!(ledger.hashes(lock_page - 2, 5).unwrap(), [0, 5, 0, 6, 7]);
            ledger.fold().unwrap();
        }
    }

    #[test]
    fn a_fold_that_a_crash_cut_short_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        let mut ledger = Ledger::create(&path, PAGE_SIZE, 0).unwrap();
        ledger.apply(3, &change(&[(1, 1), (2, 2), (3, 3)])).unwrap();
        ledger.fold().unwrap();
        ledger.apply(3, &change(&[(2, 5), (3, 6)])).unwrap();
        let (overlay, known) = (ledger.overlay().clone(), ledger.fingerprint().unwrap());
        // Page 2's new hash has reached the base, page 3's has not; the state still holds both.
        let base = File::options().write(true).open(&path).unwrap();
        base.write_all_at(&overlay[&2].to_le_bytes(), 8).unwrap();
        let reopened = Ledger::open(&path, PAGE_SIZE, 3, known, overlay).unwrap();
        for (number, fill) in [(1, 1), (2, 5), (3, 6)] {
            assert!(reopened.matches(number, &image(fill)).unwrap(), "page {number}");
        }
    }
}
