//! Reading published transactions out of the WAL, each frame checked, and single pages as of the last one read.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::SqliteError;
use super::live::Files;
use super::wal::{Checksum, FRAME_HEADER_LEN, Salts, WAL_HEADER_LEN, WalHeader, is_commit_frame};
use super::wal_index::WalIndex;

/// How much of the WAL is read at a time, in bytes. A transaction that fits is never read twice.
const WINDOW_LEN: usize = 1 << 20;

/// A place in a WAL: after frame `frame_count` of the generation `salts`, where the running checksum is `checksum`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalPosition {
    /// The generation.
    pub salts: Salts,
    /// Number of frames before the place.
    pub frame_count: u32,
    /// The running checksum of the frame before the place, or of the WAL's header.
    pub checksum: Checksum,
}

/// One page of a transaction: where its image is, and the image's hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageImage {
    /// The page.
    pub page_number: u32,
    /// Index of the frame that holds the image.
    frame: u32,
    /// Hash of the image, as the follower's hash function gives it.
    pub hash: u64,
}

/// One committed transaction.
#[derive(Debug)]
pub struct WalTransaction<'a> {
    /// Size of the database after it, in pages.
    pub size_pages: u32,
    /// Its pages in ascending order, each once, none above `size_pages`.
    pub pages: &'a [PageImage],
}

/// Hands out the images of a transaction's pages while it is being delivered, and those that it found.
#[derive(Debug)]
pub struct Images<'a> {
    files: &'a Files,
    header: WalHeader,
    window: &'a Window,
    hash: PageHash,
    /// Where the pages were before the transaction.
    in_wal: &'a HashMap<u32, InWal>,
    /// Whether the pages that the transaction found must be there.
    is_pinned: bool,
    scratch: Vec<u8>,
    former: Vec<u8>,
}

impl Images<'_> {
    /// The image of a page of the transaction being delivered.
    ///
    /// From the buffer that was checked, if it is still there; otherwise read again and checked against its hash.
    ///
    /// # Errors
    /// [`SqliteError::Unsettled`] when the bytes are not those that were checked.
    pub fn get(&mut self, page: &PageImage) -> Result<&[u8], SqliteError> {
        Ok(self.get_with_former(page, None)?.0)
    }

    /// The same, and the page as the transaction found it, if that has the hash `former_hash` and can still be read.
    ///
    /// It is read from where it was last seen, which another checkpoint or a new generation of the WAL may have changed since: only
    /// the hash proves that it is the one.
    ///
    /// # Errors
    /// As [`Images::get`]. [`SqliteError::PageChanged`] when the page is not there though nobody but SQLite can have changed it: see
    /// [`Follower::note_pinned`].
    pub fn get_with_former(
        &mut self,
        page: &PageImage,
        former_hash: Option<u64>,
    ) -> Result<(&[u8], Option<&[u8]>), SqliteError> {
        let former = match former_hash {
            Some(hash) => match self.find_former(page.page_number, hash)? {
                Former::Unknown if self.is_pinned => {
                    let path = self.files.path().to_owned();
                    return Err(SqliteError::PageChanged { path, page_number: page.page_number });
                }
                former => former,
            },
            None => Former::Unknown,
        };
        let image = match self.window.frame(&self.header, page.frame) {
            Some(frame) => &frame[FRAME_HEADER_LEN..],
            None => {
                self.scratch.resize(self.header.page_size as usize, 0);
                if !read_frame(self.files, &self.header, page.frame, &mut self.scratch)?
                    || (self.hash)(page.page_number, &self.scratch) != page.hash
                {
                    return Err(SqliteError::Unsettled { path: self.files.path().to_owned() });
                }
                &self.scratch
            }
        };
        let former = match former {
            Former::Unknown => None,
            Former::Frame(frame) => self.window.frame(&self.header, frame).map(|frame| &frame[FRAME_HEADER_LEN..]),
            Former::Read => Some(self.former.as_slice()),
        };
        Ok((image, former))
    }

    /// Finds the page with this hash as it was before the transaction.
    fn find_former(&mut self, page_number: u32, hash: u64) -> Result<Former, SqliteError> {
        let known = self.in_wal.get(&page_number).filter(|known| known.hash == hash);
        if let Some(known) = known
            && self.window.frame(&self.header, known.frame).is_some()
        {
            return Ok(Former::Frame(known.frame));
        }
        self.former.resize(self.header.page_size as usize, 0);
        if let Some(known) = known
            && read_frame(self.files, &self.header, known.frame, &mut self.former)?
            && (self.hash)(page_number, &self.former) == hash
        {
            return Ok(Former::Read);
        }
        self.files.read_main_pages(page_number, &mut self.former)?;
        let is_right = (self.hash)(page_number, &self.former) == hash;
        Ok(if is_right { Former::Read } else { Former::Unknown })
    }
}

/// Where a page is as a transaction found it.
enum Former {
    Unknown,
    /// In the window, where it was checked when its transaction was read.
    Frame(u32),
    /// It was read again, and checked.
    Read,
}

/// Reads the page of a frame; tells whether the WAL goes that far.
fn read_frame(files: &Files, header: &WalHeader, frame: u32, page: &mut [u8]) -> Result<bool, SqliteError> {
    let offset = header.frame_offset(frame) + FRAME_HEADER_LEN as u64;
    Ok(files.read_wal(offset, page)? == page.len())
}

/// A run of frames as they were read.
#[derive(Debug, Default)]
struct Window {
    first_frame: u32,
    bytes: Vec<u8>,
    /// So many of the bytes were read; the rest is memory for more.
    len: usize,
}

impl Window {
    fn frame(&self, header: &WalHeader, index: u32) -> Option<&[u8]> {
        let start = index.checked_sub(self.first_frame)? as usize * header.frame_len();
        self.bytes[..self.len].get(start..start + header.frame_len())
    }

    /// Reads frames from `first_frame` on, up to `end_frame`, as many as fit (always at least one).
    fn fill(&mut self, files: &Files, header: &WalHeader, first_frame: u32, end_frame: u32) -> Result<(), SqliteError> {
        let frames = (WINDOW_LEN / header.frame_len()).clamp(1, (end_frame - first_frame) as usize);
        let len = frames * header.frame_len();
        if self.bytes.len() < len {
            self.bytes.resize(len, 0);
        }
        self.len = files.read_wal(header.frame_offset(first_frame), &mut self.bytes[..len])?;
        self.first_frame = first_frame;
        Ok(())
    }
}

/// Hash of a page's image: page number, bytes.
pub type PageHash = fn(u32, &[u8]) -> u64;

/// Where the latest image of a page is in the WAL's current generation, and its hash.
#[derive(Debug, Clone, Copy)]
struct InWal {
    frame: u32,
    hash: u64,
}

/// Follows a database's WAL from commit to commit.
///
/// Correct only under the pin: see [`super::live`].
#[derive(Debug)]
pub struct Follower {
    hash: PageHash,
    page_size: u32,
    header: Option<WalHeader>,
    frame_count: u32,
    checksum: Checksum,
    size_pages: u32,
    /// SQLite's count of commits at the last one read; `None` until the first is, after taking up an earlier place.
    commit_counter: Option<u32>,
    /// Transactions read since then.
    seen: u32,
    /// Page and hash of the commit frame before, in this generation.
    last_commit: Option<(u32, u64)>,
    /// The generation that was read then; `None` while no frame of any was seen.
    counted_generation: Option<Salts>,
    /// Whether a generation was begun since then.
    generation_is_new: bool,
    /// Every page of the current generation's frames that were read, so that pages can be read as of now.
    in_wal: HashMap<u32, InWal>,
    is_pinned: bool,
    window: Window,
}

impl Follower {
    /// Takes the database's state as it is now for the start, delivering nothing, or, if the WAL still holds `left_at`
    /// and its checksum, takes the state there. The second value tells which: `true` means that nothing between
    /// `left_at` and now is missing from the WAL.
    ///
    /// `main_is_whole` tells that all there was when `left_at` was noted stood in the main file, and that the file was not touched
    /// since: a WAL that was begun anew then holds everything that came after, from its first frame on. (Beginning it anew once
    /// more would have taken a checkpoint, which touches the main file.)
    ///
    /// # Errors
    /// As [`Follower::read_published`].
    pub fn attach(
        files: &Files,
        hash: PageHash,
        left_at: Option<WalPosition>,
        main_is_whole: bool,
    ) -> Result<(Self, bool), SqliteError> {
        for _ in 0..20 {
            let mut follower = Self {
                hash,
                page_size: files.page_size,
                header: None,
                frame_count: 0,
                checksum: Checksum::default(),
                size_pages: 0,
                commit_counter: None,
                seen: 0,
                last_commit: None,
                counted_generation: None,
                generation_is_new: false,
                in_wal: HashMap::new(),
                is_pinned: false,
                window: Window::default(),
            };
            match follower.attach_once(files, left_at, main_is_whole) {
                Err(SqliteError::Unsettled { .. }) => {}
                Err(other) => return Err(other),
                Ok(continues) => return Ok((follower, continues)),
            }
        }
        Err(SqliteError::Unsettled { path: files.path().to_owned() })
    }

    fn attach_once(
        &mut self,
        files: &Files,
        left_at: Option<WalPosition>,
        main_is_whole: bool,
    ) -> Result<bool, SqliteError> {
        let index = files.wal_index()?;
        // A wal-index made anew over an empty WAL does not know the size; then SQLite, too, asks the file.
        self.size_pages = if index.size_pages == 0 { files.main_size_pages()? } else { index.size_pages };
        if index.frame_count == 0 {
            self.commit_counter = Some(index.commit_counter);
            return Ok(main_is_whole);
        }
        self.begin_generation(files, &index)?;
        self.counted_generation = Some(index.salts);
        let is_left = |left_at: WalPosition| self.header.is_some_and(|header| header.salts == left_at.salts);
        if main_is_whole && !left_at.is_some_and(is_left) {
            self.size_pages = files.main_size_pages()?;
            return Ok(true);
        }
        let ignore = &mut |_: &WalTransaction<'_>, _: &mut Images<'_>| Ok::<(), SqliteError>(());
        if let Some(left_at) = left_at
            && is_left(left_at)
            && left_at.frame_count <= index.frame_count
        {
            match self.read_frames(files, left_at.frame_count, None, ignore) {
                // After a power failure the WAL may have gone on from an earlier place: then the place lies inside of a transaction.
                Err(SqliteError::Unsettled { .. }) => {}
                other => drop(other?),
            }
            self.seen = 0;
            if (self.frame_count, self.checksum) == (left_at.frame_count, left_at.checksum) {
                if self.frame_count == index.frame_count {
                    // A pin that began when all of this was in the main file protects it from nobody: the next generation may begin
                    // before we look again.
                    self.commit_counter = Some(index.commit_counter);
                }
                self.forget_backfilled(&index);
                return Ok(true);
            }
        }
        self.read_frames(files, index.frame_count, None, ignore)?;
        self.forget_backfilled(&index);
        self.seen = 0;
        self.commit_counter = Some(index.commit_counter);
        Ok(false)
    }

    /// Everything that was published when the pin was begun is read: what comes from here on found pages that are still to be had, in
    /// the WAL or in the main file, because the pin keeps checkpoints from what comes behind it. Before that a checkpoint may have
    /// copied later images over them.
    ///
    /// `index` is as it was before that: what stands in the main file since then is there and nowhere else. SQLite does not look for it in
    /// the WAL any more, whoever has written to the main file meanwhile.
    pub fn note_pinned(&mut self, index: &WalIndex) {
        if !self.is_pinned {
            self.forget_backfilled(index);
            self.is_pinned = true;
        }
    }

    fn forget_backfilled(&mut self, index: &WalIndex) {
        if self.is_in_generation_of(index) {
            self.in_wal.retain(|_, known| known.frame >= index.backfilled_frames);
        }
    }

    /// Where the follower stands in the WAL; `None` while no frame of any generation was seen.
    #[must_use]
    pub fn position(&self) -> Option<WalPosition> {
        let salts = self.header?.salts;
        Some(WalPosition { salts, frame_count: self.frame_count, checksum: self.checksum })
    }

    /// Size of the database in pages, as of the last transaction that was read.
    #[must_use]
    pub fn size_pages(&self) -> u32 {
        self.size_pages
    }

    /// Bytes of the WAL's current generation that were read.
    #[must_use]
    pub fn wal_len_bytes(&self) -> u64 {
        self.header.map_or(0, |header| header.frame_offset(self.frame_count))
    }

    /// Delivers every transaction that is published and was not delivered yet, in order; returns how many.
    ///
    /// # Errors
    /// What `deliver` answers. [`SqliteError::Unsettled`] when the WAL was restarted meanwhile: call again.
    /// [`SqliteError::Gap`] when SQLite counted other commits than were read. After an error the follower stands after the
    /// last transaction that was delivered.
    pub fn read_published<E: From<SqliteError>>(
        &mut self,
        files: &Files,
        deliver: &mut impl FnMut(&WalTransaction<'_>, &mut Images<'_>) -> Result<(), E>,
    ) -> Result<u32, E> {
        let index = files.wal_index()?;
        if index.frame_count == 0 {
            // Begun anew, no frame yet: everything is in the main file.
            self.in_wal.clear();
            self.generation_is_new = true;
            self.check_count(files, &index, false)?;
            return Ok(0);
        }
        if self.header.is_none_or(|header| header.salts != index.salts) {
            self.begin_generation(files, &index)?;
            self.generation_is_new = true;
        }
        let before = self.frame_count;
        let committed = self.commit_counter.map(|before| index.commit_counter.wrapping_sub(before));
        let transactions = self.read_frames(files, index.frame_count, committed, deliver)?;
        self.check_count(files, &index, index.frame_count < before)?;
        Ok(transactions)
    }

    /// Checks SQLite's count of commits where it is needed. Within a generation the chain of
    /// checksums proves that nothing is missing. Where one ended, the pin promises that it was read
    /// to its end, and the count confirms it.
    fn check_count(&mut self, files: &Files, index: &WalIndex, went_back: bool) -> Result<(), SqliteError> {
        let before = self.commit_counter.replace(index.commit_counter);
        let seen = std::mem::take(&mut self.seen);
        let generation = self.header.map(|header| header.salts);
        let counted_generation = std::mem::replace(&mut self.counted_generation, generation);
        let needs_proof = std::mem::take(&mut self.generation_is_new) || went_back;
        let committed = before.map(|before| index.commit_counter.wrapping_sub(before));
        if !needs_proof || committed == Some(seen) {
            return Ok(());
        }
        let is_next = counted_generation.zip(generation).is_some_and(|(before, now)| now.is_next_after(before));
        if before.is_some() && is_next && self.has_read_all(index) && index.commit_counter <= seen {
            // `walIndexRecover` sets the count to 0. All that it counted since was read; what it
            // counted before in this generation was read from the first frame on. Left to the pin
            // alone is the end of the generation before, after which SQLite restarted the WAL once
            // only.
            tracing::info!(database = %files.path().display(), "SQLite recovered the wal-index; no transaction is missing");
            return Ok(());
        }
        Err(SqliteError::Gap { path: files.path().to_owned(), seen, committed: committed.unwrap_or(u32::MAX) })
    }

    /// Reads the WAL's header as that of the generation that `index` publishes.
    fn begin_generation(&mut self, files: &Files, index: &WalIndex) -> Result<(), SqliteError> {
        let unsettled = || SqliteError::Unsettled { path: files.path().to_owned() };
        let mut bytes = [0; WAL_HEADER_LEN];
        if files.read_wal(0, &mut bytes)? != bytes.len() {
            return Err(unsettled());
        }
        let header = WalHeader::parse(&bytes).ok_or_else(unsettled)?;
        if header.salts != index.salts {
            return Err(unsettled());
        }
        if header.page_size != self.page_size {
            return Err(SqliteError::Replaced { path: files.path().to_owned() });
        }
        // A generation begins when all of the one before is in the main file.
        self.in_wal.clear();
        self.last_commit = None;
        self.header = Some(header);
        self.frame_count = 0;
        self.checksum = header.checksum;
        Ok(())
    }

    /// Delivers the transactions up to frame `end_frame`, which ends one.
    ///
    /// `committed` is SQLite's count of the commits since the last one that was counted, up to that
    /// frame; `None` if no earlier count is known. It tells commits that change nothing from copies
    /// of a commit frame: both repeat the frame before. Where a device may damage a sector's other
    /// bytes, `walFrames` pads a transaction to the end of the sector with copies of its commit
    /// frame, and adds one to `iChange`. A commit that changes nothing adds one as well.
    fn read_frames<E: From<SqliteError>>(
        &mut self,
        files: &Files,
        end_frame: u32,
        committed: Option<u32>,
        deliver: &mut impl FnMut(&WalTransaction<'_>, &mut Images<'_>) -> Result<(), E>,
    ) -> Result<u32, E> {
        let unsettled = || SqliteError::Unsettled { path: files.path().to_owned() };
        let header = self.header.ok_or_else(unsettled)?;
        let mut next = self.frame_count;
        let mut checksum = self.checksum;
        let mut images = BTreeMap::new();
        let mut transactions = 0;
        // Commit frames from the current one to the end; counted when the first repeated one is
        // met.
        let mut commit_frames = None;
        // What an earlier call read may have been overwritten since.
        self.window.len = 0;
        while next < end_frame {
            if self.window.frame(&header, next).is_none() {
                self.window.fill(files, &header, next, end_frame)?;
            }
            let bytes = self.window.frame(&header, next).ok_or_else(unsettled)?;
            let frame = header.check_frame(checksum, bytes).ok_or_else(unsettled)?;
            // A transaction that spilled holds a page several times; the last image counts.
            let hash = (self.hash)(frame.page_number, &bytes[FRAME_HEADER_LEN..]);
            images.insert(frame.page_number, InWal { frame: next, hash });
            (next, checksum) = (next + 1, frame.checksum);
            if frame.commit_size_pages != 0 {
                let is_alone = next == self.frame_count + 1 && frame.commit_size_pages == self.size_pages;
                let is_repeated = is_alone && self.last_commit == Some((frame.page_number, hash));
                commit_frames = match commit_frames {
                    None if is_repeated && committed.is_some() => {
                        Some(1 + self.count_commit_frames(files, &header, next..end_frame)?)
                    }
                    counted => counted.map(|frames: u32| frames.saturating_sub(1)),
                };
                // If as many commits as commit frames are left, none of these frames is a copy. As
                // long as fewer are left, a repeated frame is skipped. So exactly the counted
                // commits are delivered.
                let commits = committed.and_then(|committed| committed.checked_sub(self.seen));
                if is_repeated && (commits.is_none() || commits != commit_frames) {
                    images.clear();
                    (self.frame_count, self.checksum) = (next, checksum);
                    continue;
                }
                self.last_commit = Some((frame.page_number, hash));
                images.retain(|&page_number, _| page_number <= frame.commit_size_pages);
                self.deliver_transaction(files, header, frame.commit_size_pages, &images, deliver)?;
                self.frame_count = next;
                self.checksum = checksum;
                self.take_in(frame.commit_size_pages, &mut images);
                self.seen = self.seen.wrapping_add(1);
                transactions += 1;
            }
        }
        if images.is_empty() { Ok(transactions) } else { Err(unsettled().into()) }
    }

    /// Counts the commit frames among `frames` by their headers, which are not checked here.
    fn count_commit_frames(&self, files: &Files, header: &WalHeader, frames: Range<u32>) -> Result<u32, SqliteError> {
        let mut count = 0;
        let mut bytes = [0; FRAME_HEADER_LEN];
        for index in frames {
            match self.window.frame(header, index) {
                Some(frame) => bytes.copy_from_slice(&frame[..FRAME_HEADER_LEN]),
                None if files.read_wal(header.frame_offset(index), &mut bytes)? == bytes.len() => {}
                None => return Err(SqliteError::Unsettled { path: files.path().to_owned() }),
            }
            count += u32::from(is_commit_frame(&bytes));
        }
        Ok(count)
    }

    fn deliver_transaction<E: From<SqliteError>>(
        &mut self,
        files: &Files,
        header: WalHeader,
        size_pages: u32,
        images: &BTreeMap<u32, InWal>,
        deliver: &mut impl FnMut(&WalTransaction<'_>, &mut Images<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let pages: Vec<PageImage> = images
            .iter()
            .map(|(&page_number, image)| PageImage { page_number, frame: image.frame, hash: image.hash })
            .collect();
        let mut source = Images {
            files,
            header,
            window: &self.window,
            hash: self.hash,
            in_wal: &self.in_wal,
            is_pinned: self.is_pinned,
            scratch: Vec::new(),
            former: Vec::new(),
        };
        deliver(&WalTransaction { size_pages, pages: &pages }, &mut source)
    }

    /// Remembers where a delivered transaction's pages are.
    fn take_in(&mut self, size_pages: u32, images: &mut BTreeMap<u32, InWal>) {
        if size_pages < self.size_pages {
            self.in_wal.retain(|&page_number, _| page_number <= size_pages);
        }
        self.size_pages = size_pages;
        self.in_wal.extend(std::mem::take(images));
    }

    /// Reads consecutive pages from `first_page` on as of the last transaction that was read, whatever has been
    /// committed since. The length of `pages` is a multiple of the page size.
    ///
    /// Under the pin, nothing newer than what it covers can be in the main file, and a page that no frame of this
    /// generation holds is right there. A page that one does hold is in the WAL, or, when the WAL was restarted under a pin
    /// at mark 0, in the main file; its hash tells.
    ///
    /// # Errors
    /// [`SqliteError::PageChanged`] when neither place has a page as its last transaction wrote it.
    pub fn read_pages(&self, files: &Files, first_page: u32, pages: &mut [u8]) -> Result<(), SqliteError> {
        files.read_main_pages(first_page, pages)?;
        for (page_number, page) in (first_page..).zip(pages.chunks_exact_mut(self.page_size as usize)) {
            let Some((known, header)) = self.in_wal.get(&page_number).zip(self.header) else { continue };
            if (self.hash)(page_number, page) == known.hash {
                continue;
            }
            if read_frame(files, &header, known.frame, page)? && (self.hash)(page_number, page) == known.hash {
                continue;
            }
            // The WAL was restarted between our two reads: now the main file has it.
            files.read_main_pages(page_number, page)?;
            if (self.hash)(page_number, page) != known.hash {
                return Err(SqliteError::PageChanged { path: files.path().to_owned(), page_number });
            }
        }
        Ok(())
    }

    /// Returns whether the pages that count as copied are in the main file as their last transaction wrote them. A page
    /// whose newest frame is not copied yet is passed over.
    ///
    /// # Errors
    /// [`SqliteError::PageChanged`] names the first that is not; as the operating system answers.
    pub fn check_copied(&self, files: &Files, index: &WalIndex) -> Result<bool, SqliteError> {
        if !self.is_in_generation_of(index) {
            return Ok(index.frame_count == 0);
        }
        let mut page = vec![0; self.page_size as usize];
        for (&page_number, known) in &self.in_wal {
            if known.frame >= index.backfilled_frames {
                continue;
            }
            files.read_main_pages(page_number, &mut page)?;
            if (self.hash)(page_number, &page) != known.hash {
                return Err(SqliteError::PageChanged { path: files.path().to_owned(), page_number });
            }
        }
        Ok(index.backfilled_frames > 0)
    }

    /// How many bytes of frames `index` publishes that were not read yet, and how many at all.
    #[must_use]
    pub fn unread_bytes(&self, index: &WalIndex) -> (u64, u64) {
        let read_frames = if self.is_in_generation_of(index) { self.frame_count } else { 0 };
        let frame_len = FRAME_HEADER_LEN as u64 + u64::from(self.page_size);
        let len = |frames: u32| u64::from(frames) * frame_len;
        (len(index.frame_count.saturating_sub(read_frames)), len(index.frame_count))
    }

    /// Whether `index` publishes a transaction that was not read yet.
    #[must_use]
    pub fn is_behind(&self, index: &WalIndex) -> bool {
        index.frame_count != 0 && !self.has_read_all(index)
    }

    /// Whether `index` publishes frames up to the last one read, and no others.
    fn has_read_all(&self, index: &WalIndex) -> bool {
        self.is_in_generation_of(index) && index.frame_count == self.frame_count
    }

    fn is_in_generation_of(&self, index: &WalIndex) -> bool {
        self.header.is_some_and(|header| header.salts == index.salts)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use rusqlite::Connection;

    use super::*;
    use crate::sqlite::live::LiveDatabase;
    use crate::sqlite::sidecar;

    fn hash(page_number: u32, page: &[u8]) -> u64 {
        page.iter().fold(u64::from(page_number), |sum, &byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)))
    }

    /// Checks what each transaction's pages were before it, as `known` has them; gives how many had been there.
    fn check(live: &mut LiveDatabase, follower: &mut Follower, known: &mut HashMap<u32, Vec<u8>>) -> usize {
        let (mut found, is_pinned) = (0, follower.is_pinned);
        let mut deliver = |transaction: &WalTransaction<'_>, images: &mut Images<'_>| {
            for page in transaction.pages {
                let former = known.get(&page.page_number);
                let former_hash = former.map(|former| hash(page.page_number, former));
                assert!(images.get_with_former(page, None)?.1.is_none());
                // A state that is not this one's: the page is never given for it, and from the second time on it is an error.
                match images.get_with_former(page, Some(1)) {
                    Ok((_, former)) => assert!(former.is_none() && !is_pinned),
                    Err(error) => assert!(matches!(error, SqliteError::PageChanged { .. }) && is_pinned),
                }
                let (image, given) = images.get_with_former(page, former_hash)?;
                assert_eq!(given, former.map(Vec::as_slice), "page {}", page.page_number);
                found += usize::from(former.is_some());
                known.insert(page.page_number, image.to_vec());
            }
            Ok::<(), SqliteError>(())
        };
        live.advance_pin(|files| follower.read_published(files, &mut deliver)).unwrap();
        follower.note_pinned(&live.files.wal_index().unwrap());
        found
    }

    #[test]
    fn the_page_that_a_transaction_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.db");
        let application = Connection::open(&path).unwrap();
        application.execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE item(id INTEGER PRIMARY KEY, body)").unwrap();
        let mut live = LiveDatabase::open(&path).unwrap();
        let mut follower = Follower::attach(&live.files, hash, None, false).unwrap().0;
        let mut known = HashMap::new();
        let write = |times: usize| {
            for _ in 0..times {
                application.execute_batch("INSERT INTO item(body) VALUES(randomblob(700))").unwrap();
            }
        };
        // The first time nothing is known; then pages are in the window, in the WAL, and at last in the main file.
        write(5);
        check(&mut live, &mut follower, &mut known);
        write(5);
        assert!(check(&mut live, &mut follower, &mut known) >= 5);
        for _ in 0..3 {
            application.execute_batch("PRAGMA wal_checkpoint(PASSIVE)").unwrap();
            check(&mut live, &mut follower, &mut known);
            application.execute_batch("PRAGMA wal_checkpoint(PASSIVE)").unwrap();
            let generation = follower.position().unwrap().salts;
            write(2);
            assert!(check(&mut live, &mut follower, &mut known) >= 2);
            assert_ne!(follower.position().unwrap().salts, generation, "the WAL was begun anew");
        }
    }

    /// Reads what is published; returns how many transactions that were, by the follower and by
    /// SQLite's count.
    fn count(live: &mut LiveDatabase, follower: &mut Follower) -> [u32; 2] {
        let before = follower.commit_counter.unwrap();
        let mut transactions = 0;
        let mut deliver = |_: &WalTransaction<'_>, _: &mut Images<'_>| {
            transactions += 1;
            Ok::<(), SqliteError>(())
        };
        live.advance_pin(|files| follower.read_published(files, &mut deliver)).unwrap();
        [transactions, live.files.wal_index().unwrap().commit_counter.wrapping_sub(before)]
    }

    /// Writes a page and leaves it as it was. (An UPDATE to the same value would write none:
    /// `btreeOverwriteContent`.)
    const NO_OP: &str = "BEGIN; DELETE FROM item WHERE n = 7; INSERT INTO item(n) VALUES(7); COMMIT";

    #[test]
    fn commit_that_changes_nothing_is_a_transaction() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.db");
        let application = Connection::open(&path).unwrap();
        application.execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE item(n)").unwrap();
        application.execute_batch(NO_OP).unwrap();
        let mut live = LiveDatabase::open(&path).unwrap();
        let mut follower = Follower::attach(&live.files, hash, None, false).unwrap().0;
        for _ in 0..3 {
            for no_ops in [1, 3] {
                for _ in 0..no_ops {
                    application.execute_batch(NO_OP).unwrap();
                }
                application.execute_batch("INSERT INTO item VALUES(1); DELETE FROM item WHERE n = 1").unwrap();
                assert_eq!(count(&mut live, &mut follower), [no_ops + 2; 2]);
            }
            application.execute_batch("PRAGMA wal_checkpoint(PASSIVE)").unwrap();
            count(&mut live, &mut follower);
        }
    }

    /// With `psow=0` SQLite pads each transaction to the end of the sector with copies of the
    /// commit frame, which it does not count.
    #[test]
    fn commit_frames_that_fill_a_sector_up_are_no_commits() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.db");
        let application = Connection::open(format!("file:{}?psow=0", path.display())).unwrap();
        let setup = "PRAGMA page_size=512; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE item(n)";
        application.execute_batch(setup).unwrap();
        let mut live = LiveDatabase::open(&path).unwrap();
        let mut follower = Follower::attach(&live.files, hash, None, false).unwrap().0;
        for _ in 0..3 {
            application.execute_batch("PRAGMA wal_checkpoint(PASSIVE)").unwrap();
            count(&mut live, &mut follower);
            for _ in 0..4 {
                application.execute_batch("INSERT INTO item VALUES(1)").unwrap();
            }
            assert_eq!(count(&mut live, &mut follower), [4; 2]);
            assert!(follower.frame_count > 4, "{} frames", follower.frame_count);
        }
    }

    #[test]
    fn commit_that_changes_nothing_is_counted_among_copies() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.db");
        let padding = Connection::open(format!("file:{}?psow=0", path.display())).unwrap();
        padding.execute_batch("PRAGMA page_size=512; PRAGMA journal_mode=WAL; CREATE TABLE item(n)").unwrap();
        padding.execute_batch("PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=0").unwrap();
        padding.execute_batch(NO_OP).unwrap();
        let bare = Connection::open(&path).unwrap();
        bare.execute_batch("PRAGMA synchronous=OFF; PRAGMA wal_autocheckpoint=0").unwrap();
        let mut live = LiveDatabase::open(&path).unwrap();
        let mut follower = Follower::attach(&live.files, hash, None, false).unwrap().0;
        let window_frames = WINDOW_LEN as u32 / (FRAME_HEADER_LEN as u32 + 512);
        for (round, commits) in [5, 600, 12].into_iter().enumerate() {
            padding.execute_batch("PRAGMA wal_checkpoint(PASSIVE)").unwrap();
            count(&mut live, &mut follower);
            for n in 0..commits {
                let application = if n % 5 == 3 { &bare } else { &padding };
                let sql = if n % 3 == 1 { "UPDATE item SET n = n + 1 WHERE n > 7" } else { NO_OP };
                application.execute_batch(sql).unwrap();
            }
            padding.execute_batch("INSERT INTO item VALUES(8)").unwrap();
            let [delivered, counted] = count(&mut live, &mut follower);
            assert_eq!(delivered, counted, "round {round}");
            assert!(follower.frame_count > 4 * commits, "{} frames", follower.frame_count);
            assert_eq!(follower.frame_count > window_frames, commits == 600, "the scan goes beyond the window");
        }
    }

    fn application_and_follower(path: &Path) -> (Connection, LiveDatabase, Follower) {
        let application = Connection::open(path).unwrap();
        application.execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE item(n)").unwrap();
        let live = LiveDatabase::open(path).unwrap();
        let follower = Follower::attach(&live.files, hash, None, false).unwrap().0;
        (application, live, follower)
    }

    fn insert(application: &Connection, times: u32) {
        for _ in 0..times {
            application.execute_batch("INSERT INTO item VALUES(1)").unwrap();
        }
    }

    /// Lets the next writer restart the WAL: all of it is in the main file, and the pin is at mark
    /// 0.
    fn release_wal(application: &Connection, live: &mut LiveDatabase, follower: &mut Follower) {
        for _ in 0..2 {
            application.execute_batch("PRAGMA wal_checkpoint(PASSIVE)").unwrap();
            count(live, follower);
        }
    }

    /// Leaves the wal-index as a writer that dies in `walIndexWriteHdr`: its copies differ, and the
    /// next one to read it calls `walIndexRecover`. Another process writes it: to close the file
    /// here would drop SQLite's locks.
    fn tear_wal_index(path: &Path) {
        let shm = sidecar(path, "-shm");
        let mut command = Command::new("dd");
        command.args(["if=/dev/zero", "bs=1", "seek=8", "count=8", "conv=notrunc", "status=none"]);
        assert!(command.arg(format!("of={}", shm.display())).status().unwrap().success());
    }

    #[test]
    fn recovery_of_the_wal_index_between_generations_is_no_gap() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.db");
        let (application, mut live, mut follower) = application_and_follower(&path);
        insert(&application, 9);
        assert_eq!(count(&mut live, &mut follower), [9; 2]);
        let commits_counted = |live: &LiveDatabase| live.files.wal_index().unwrap().commit_counter;
        for round in 0..3 {
            // Within a generation: the chain of checksums is the proof.
            insert(&application, 2);
            tear_wal_index(&path);
            insert(&application, 3);
            assert_eq!(commits_counted(&live), 3, "round {round}: recovered");
            assert_eq!(count(&mut live, &mut follower)[0], 5, "round {round}");
            // The count goes on from there.
            release_wal(&application, &mut live, &mut follower);
            insert(&application, 4);
            assert_eq!(count(&mut live, &mut follower), [4; 2], "round {round}");
            // Behind a restart: the chain from the first frame on, and the salt.
            release_wal(&application, &mut live, &mut follower);
            let generation = follower.position().unwrap().salts;
            insert(&application, 3);
            tear_wal_index(&path);
            insert(&application, round);
            application.execute_batch("SELECT * FROM item").unwrap();
            assert_eq!(commits_counted(&live), round, "round {round}: recovered");
            assert_eq!(count(&mut live, &mut follower)[0], 3 + round, "round {round}");
            assert!(follower.position().unwrap().salts.is_next_after(generation));
        }
    }

    #[test]
    fn recovery_of_the_wal_index_does_not_hide_a_gap() {
        for is_recovered_first in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("app.db");
            let (application, mut live, mut follower) = application_and_follower(&path);
            // The pin moves for the other follower; this one does not read.
            let mut left_behind = Follower::attach(&live.files, hash, None, false).unwrap().0;
            if is_recovered_first {
                tear_wal_index(&path);
            }
            insert(&application, 2);
            count(&mut live, &mut follower);
            release_wal(&application, &mut live, &mut follower);
            insert(&application, 3);
            if !is_recovered_first {
                count(&mut live, &mut follower);
                release_wal(&application, &mut live, &mut follower);
                insert(&application, 3);
                tear_wal_index(&path);
                insert(&application, 2);
            }
            let mut ignore = |_: &WalTransaction<'_>, _: &mut Images<'_>| Ok::<(), SqliteError>(());
            let read = left_behind.read_published(&live.files, &mut ignore);
            assert!(matches!(read, Err(SqliteError::Gap { .. })), "{is_recovered_first}: {read:?}");
            count(&mut live, &mut follower);
        }
    }
}
