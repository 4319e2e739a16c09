//! The images of a run while it is collected, in little memory: of a page the first image is kept, and what each later one changed.

use std::collections::HashMap;
use std::io;

use super::segment::{Place, TransactionInfo, places};

/// So much of images and changes makes a run full. A second one is collected while the first is compressed.
const MEMORY_LIMIT: usize = 10 << 20;
/// So many bytes of page images do: a reader puts all images of a run in order.
const RAW_LIMIT: usize = 64 << 20;
/// A transaction of more bytes of page images is written by itself.
const TRANSACTION_LIMIT: usize = 4 << 20;

/// Images are compared in words of so many bytes. Every page size is a multiple of it.
const WORD_LEN: usize = 8;
/// What a change begins with: how many words to pass over and how many follow, 2 bytes each.
const CHANGE_HEADER_LEN: usize = 4;

/// Transactions whose images are put in order when the run is full.
#[derive(Debug, Default)]
pub struct RunBuffer {
    page_size: usize,
    transactions: Vec<(TransactionInfo, usize)>,
    /// Of all images.
    page_numbers: Vec<u32>,
    /// What is kept of each image, one after another: all of it, or what it changed in the one before of that page.
    content: Vec<u8>,
    /// Where in it each image's part begins.
    starts: Vec<usize>,
    latest: HashMap<u32, Latest>,
    /// The latest images of pages that have several.
    latest_images: Vec<u8>,
}

/// Where the latest image of a page is.
#[derive(Debug, Clone, Copy)]
enum Latest {
    /// In the content: the only one yet.
    Content(usize),
    /// In the latest images.
    Own(usize),
}

impl RunBuffer {
    /// Before the first transaction of a run with pages of this size. The memory of the run before is used again.
    pub fn reset(&mut self, page_size: u32) {
        self.page_size = page_size as usize;
        self.transactions.clear();
        self.page_numbers.clear();
        self.content.clear();
        self.starts.clear();
        self.latest.clear();
        self.latest_images.clear();
    }

    /// Whether a transaction with so many pages is too large for any run with others.
    #[must_use]
    pub fn is_too_large(&self, page_count: usize) -> bool {
        page_count * self.page_size > TRANSACTION_LIMIT
    }

    /// Whether a transaction with so many pages has no room any more.
    #[must_use]
    pub fn is_full_for(&self, page_count: usize) -> bool {
        let len = page_count * self.page_size;
        let memory_len = self.content.len() + self.latest_images.len();
        !self.is_empty() && (memory_len + len > MEMORY_LIMIT || self.raw_len() + len > RAW_LIMIT)
    }

    /// Whether less than half of the room is left.
    #[must_use]
    pub fn is_half_full(&self) -> bool {
        self.content.len() + self.latest_images.len() > MEMORY_LIMIT / 2 || self.raw_len() > RAW_LIMIT / 2
    }

    /// Whether there is no transaction.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.transactions.is_empty()
    }

    /// Bytes of page images.
    #[must_use]
    pub fn raw_len(&self) -> usize {
        self.page_numbers.len() * self.page_size
    }

    /// How many images are still to be pushed.
    #[must_use]
    pub fn pages_due(&self) -> usize {
        self.page_numbers.len() - self.starts.len()
    }

    /// Begins the next transaction; the images of `page_numbers` must follow.
    pub fn begin_transaction(&mut self, info: &TransactionInfo, page_numbers: &[u32]) {
        self.transactions.push((*info, page_numbers.len()));
        self.page_numbers.extend_from_slice(page_numbers);
    }

    /// Adds the image of the next page.
    ///
    /// # Errors
    /// When no page is due or the image has not the page size.
    pub fn push_page(&mut self, image: &[u8]) -> io::Result<()> {
        let due = self.page_numbers.get(self.starts.len()).filter(|_| image.len() == self.page_size);
        let Some(&page_number) = due else {
            return Err(io::Error::other("a page was not handed over as it must be"));
        };
        let start = self.content.len();
        self.starts.push(start);
        let own = match self.latest.get(&page_number) {
            None => {
                self.content.extend_from_slice(image);
                self.latest.insert(page_number, Latest::Content(start));
                return Ok(());
            }
            Some(&Latest::Own(own)) => own,
            Some(&Latest::Content(first)) => {
                let own = self.latest_images.len();
                self.latest_images.extend_from_slice(&self.content[first..first + self.page_size]);
                self.latest.insert(page_number, Latest::Own(own));
                own
            }
        };
        change(&mut self.latest_images[own..own + self.page_size], image, &mut self.content);
        Ok(())
    }

    /// The transactions, with the numbers of their pages.
    pub fn transactions(&self) -> impl Iterator<Item = (&TransactionInfo, &[u32])> {
        let mut rest = self.page_numbers.as_slice();
        self.transactions.iter().map(move |(info, page_count)| {
            let (page_numbers, others) = rest.split_at(*page_count);
            rest = others;
            (info, page_numbers)
        })
    }

    /// Hands out all images in a run's order.
    ///
    /// # Errors
    /// What `take` answers; when images are missing.
    pub fn for_each_image(&self, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        if self.pages_due() != 0 {
            return Err(io::Error::other("a run was ended before it was whole"));
        }
        let (mut image, mut page_number) = (vec![0; self.page_size], 0);
        for place in places(self.page_numbers.iter().copied(), 0) {
            let content = self.content_of(place);
            match place.page_number == page_number {
                true => apply(content, &mut image),
                false => image.copy_from_slice(content),
            }
            page_number = place.page_number;
            take(&image)?;
        }
        Ok(())
    }

    fn content_of(&self, place: Place) -> &[u8] {
        let index = place.image as usize;
        let end = self.starts.get(index + 1).copied().unwrap_or(self.content.len());
        &self.content[self.starts[index]..end]
    }
}

/// Makes `new` of `image`, and adds to `changes` what that takes: rows of words that differ, each with how far it is from the one
/// before.
fn change(image: &mut [u8], new: &[u8], changes: &mut Vec<u8>) {
    let (image, new) = (image.as_chunks_mut::<WORD_LEN>().0, new.as_chunks::<WORD_LEN>().0);
    let mut at = 0;
    while let Some(skip) = image[at..].iter().zip(&new[at..]).position(|(old, new)| old != new) {
        let start = at + skip;
        let len = image[start..].iter().zip(&new[start..]).take_while(|(old, new)| old != new).count();
        for field in [skip, len] {
            // The largest page has 8,192 words.
            changes.extend_from_slice(&(field as u16).to_le_bytes());
        }
        changes.extend_from_slice(new[start..start + len].as_flattened());
        image[start..start + len].copy_from_slice(&new[start..start + len]);
        at = start + len;
    }
}

/// Makes of `image` the one that `changes` was made for.
fn apply(mut changes: &[u8], image: &mut [u8]) {
    let mut at = 0;
    while let Some((header, rest)) = changes.split_first_chunk::<CHANGE_HEADER_LEN>() {
        let field = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]])) * WORD_LEN;
        let (start, len) = (at + field(0), field(2));
        image[start..start + len].copy_from_slice(&rest[..len]);
        (changes, at) = (&rest[len..], start + len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: TransactionInfo = TransactionInfo {
        time_ms: 1,
        size_pages: 9,
        schema_cookie: 1,
        fingerprint: None,
        coalesced: false,
        schema_changed: false,
    };

    /// A page of 512 bytes with these bytes in it.
    fn image(bytes: &[(usize, u8)]) -> Vec<u8> {
        let mut image = vec![7; 512];
        bytes.iter().for_each(|&(at, byte)| image[at] = byte);
        image
    }

    #[test]
    fn gives_every_image_as_it_was() {
        let versions = [
            (4, image(&[])),
            (2, image(&[(0, 1), (511, 2)])),
            (4, image(&[(0, 1), (8, 3), (511, 2)])),
            (2, image(&[(0, 1), (511, 2)])),
            (4, image(&[(8, 9), (9, 9), (17, 4), (500, 1)])),
            (4, vec![0; 512]),
        ];
        let mut run = RunBuffer::default();
        for _ in 0..2 {
            run.reset(512);
            for (page_number, image) in &versions {
                run.begin_transaction(&INFO, &[*page_number]);
                run.push_page(image).unwrap();
            }
            assert!(run.push_page(&versions[0].1).is_err(), "no page is due");
            let mut images = Vec::new();
            let keep = |image: &[u8]| {
                images.push(image.to_vec());
                Ok(())
            };
            run.for_each_image(keep).unwrap();
            let due = [1, 3, 0, 2, 4, 5].map(|index: usize| versions[index].1.clone());
            assert_eq!(images, due);
            assert_eq!(run.transactions().map(|(_, pages)| pages[0]).collect::<Vec<_>>(), [4, 2, 4, 2, 4, 4]);
        }
    }

    #[test]
    fn is_full_by_memory_or_by_what_readers_bear() {
        let mut run = RunBuffer::default();
        run.reset(512);
        assert!(!run.is_full_for(usize::MAX / 512), "a run has at least one transaction");
        while !run.is_full_for(1) {
            run.begin_transaction(&INFO, &[1]);
            run.push_page(&image(&[])).unwrap();
        }
        assert_eq!(run.raw_len(), RAW_LIMIT);
        run.reset(512);
        for page_number in 1.. {
            if run.is_full_for(1) {
                break;
            }
            run.begin_transaction(&INFO, &[page_number]);
            run.push_page(&image(&[])).unwrap();
        }
        assert_eq!(run.raw_len(), MEMORY_LIMIT);
    }
}
