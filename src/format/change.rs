//! What a transaction made of a page: its whole image, or what it changed in the image before.
//!
//! Most transactions change a few dozen bytes of a page. The image before is always the page as the transaction found it, so
//! whoever has the state before a transaction, and that is who restores it, can make the state after it.

use super::FormatError;

/// Length of what a page's content begins with in a segment: how many bytes follow.
pub(super) const ENTRY_HEADER_LEN: usize = 4;
/// Length of what a row of changed bytes begins with: how many bytes to pass over and how many follow, 2 bytes each.
const ROW_HEADER_LEN: usize = 4;
/// Bytes are compared so many at a time. Every page size is a multiple of it. Fewer that are alike do not end a row: another row's
/// header would be as long.
const WORD_LEN: usize = 8;

/// What a segment holds of a page after a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// The page.
    Image(&'a [u8]),
    /// What makes the page of the one before the transaction: rows of bytes, each with how far it is from the end of the one
    /// before it. Always shorter than the page.
    Changes(&'a [u8]),
}

impl<'a> Content<'a> {
    /// The shorter of the two for `image`, if `former` is the page as the transaction found it. `scratch` holds the changes.
    #[must_use]
    pub fn of(image: &'a [u8], former: Option<&[u8]>, scratch: &'a mut Vec<u8>) -> Self {
        scratch.clear();
        match former.is_some_and(|former| find_changes(former, image, scratch)) {
            true => Self::Changes(scratch),
            false => Self::Image(image),
        }
    }

    /// What a length, as a segment has it before the bytes, makes of them.
    pub(super) fn decode(bytes: &'a [u8], page_size: usize) -> Self {
        if bytes.len() == page_size { Self::Image(bytes) } else { Self::Changes(bytes) }
    }

    /// Whether it can be that of a page of so many bytes.
    pub(super) fn is_of(&self, page_size: usize) -> bool {
        match self {
            Self::Image(image) => image.len() == page_size,
            Self::Changes(changes) => changes.len() < page_size,
        }
    }

    /// What stands before it in a segment: its length in bytes.
    pub(super) fn header(&self) -> [u8; ENTRY_HEADER_LEN] {
        // A page has less than 2^32 bytes.
        (self.bytes().len() as u32).to_le_bytes()
    }

    /// As a segment has it.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Self::Image(bytes) | Self::Changes(bytes) => bytes,
        }
    }

    /// Whether changes are those of some page of so many bytes.
    ///
    /// # Errors
    /// When they are not.
    pub(super) fn check(&self, page_size: usize) -> Result<(), FormatError> {
        match self {
            Self::Image(_) => Ok(()),
            Self::Changes(changes) => {
                let mut rows = Rows::new(changes, page_size);
                while rows.next()?.is_some() {}
                Ok(())
            }
        }
    }

    /// Makes the page after the transaction of `page`, the one before it.
    ///
    /// # Errors
    /// When the changes are not those of a page of this size. `page` is worth nothing then.
    pub fn apply_to(&self, page: &mut [u8]) -> Result<(), FormatError> {
        match self {
            Self::Image(image) if image.len() == page.len() => page.copy_from_slice(image),
            Self::Image(_) => return Err(not_of_a_page()),
            Self::Changes(changes) => {
                let mut rows = Rows::new(changes, page.len());
                while let Some((start, row)) = rows.next()? {
                    page[start..start + row.len()].copy_from_slice(row);
                }
            }
        }
        Ok(())
    }
}

fn not_of_a_page() -> FormatError {
    FormatError::Inconsistent("changes in the segment are not those of a page".into())
}

/// Adds to `changes` what makes `image` of `former`; tells whether that is shorter than the image.
fn find_changes(former: &[u8], image: &[u8], changes: &mut Vec<u8>) -> bool {
    let len = image.len();
    if former.len() != len {
        return false;
    }
    let mut end = 0;
    while let Some(start) = first_difference(former, image, end) {
        let row_end = end_of_row(former, image, start);
        let (skip, row) = (start - end, &image[start..row_end]);
        if changes.len() + ROW_HEADER_LEN + row.len() >= len {
            return false;
        }
        for field in [skip, row.len()] {
            // Less than the largest page, 65,536 bytes: the row would not be shorter than the image otherwise.
            changes.extend_from_slice(&(field as u16).to_le_bytes());
        }
        changes.extend_from_slice(row);
        end = row_end;
    }
    true
}

/// The first byte from `from` on that differs.
fn first_difference(former: &[u8], image: &[u8], from: usize) -> Option<usize> {
    let (former_words, former_rest) = former[from..].as_chunks::<WORD_LEN>();
    let (image_words, image_rest) = image[from..].as_chunks::<WORD_LEN>();
    let alike = former_words.iter().zip(image_words).take_while(|(old, new)| old == new).count();
    let at = from + alike * WORD_LEN;
    match former_words.get(alike).zip(image_words.get(alike)) {
        Some((old, new)) => {
            Some(at + ((u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new)).trailing_zeros() / 8) as usize)
        }
        None => former_rest.iter().zip(image_rest).position(|(old, new)| old != new).map(|rest| at + rest),
    }
}

/// Where the row of bytes ends that begins to differ at `start`: before the next [`WORD_LEN`] that are alike, or with the last one
/// that differs.
fn end_of_row(former: &[u8], image: &[u8], start: usize) -> usize {
    let (mut last, mut at) = (start, start + 1);
    while at < image.len() && at - last <= WORD_LEN {
        if former[at] != image[at] {
            last = at;
        }
        at += 1;
    }
    last + 1
}

/// Rows of changed bytes that are still to be read, of a page of `page_len` bytes.
struct Rows<'a> {
    changes: &'a [u8],
    page_len: usize,
    /// Where the row before ended in the page.
    end: usize,
}

impl<'a> Rows<'a> {
    fn new(changes: &'a [u8], page_len: usize) -> Self {
        Self { changes, page_len, end: 0 }
    }

    /// The next row, and where in the page it belongs; `None` after the last one.
    fn next(&mut self) -> Result<Option<(usize, &'a [u8])>, FormatError> {
        if self.changes.is_empty() {
            return Ok(None);
        }
        let (header, rest) = self.changes.split_first_chunk::<ROW_HEADER_LEN>().ok_or_else(not_of_a_page)?;
        let field = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let (start, len) = (self.end + field(0), field(2));
        let is_inside = start + len <= self.page_len;
        let (row, rest) = rest.split_at_checked(len).filter(|_| is_inside).ok_or_else(not_of_a_page)?;
        (self.changes, self.end) = (rest, start + len);
        Ok(Some((start, row)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn changed(former: &[u8], at: &[(usize, u8)]) -> Vec<u8> {
        let mut image = former.to_vec();
        at.iter().for_each(|&(at, byte)| image[at] = byte);
        image
    }

    fn check(former: &[u8], image: &[u8]) -> usize {
        let mut scratch = vec![1, 2, 3];
        let content = Content::of(image, Some(former), &mut scratch);
        let mut page = former.to_vec();
        content.apply_to(&mut page).unwrap();
        assert!(page == image);
        content.bytes().len()
    }

    #[test]
    fn changes_are_as_short_as_what_changed() {
        let former = vec![7; 4096];
        assert_eq!(check(&former, &former), 0);
        assert_eq!(check(&former, &changed(&former, &[(0, 1)])), 5);
        assert_eq!(check(&former, &changed(&former, &[(4095, 1)])), 5);
        assert_eq!(check(&former, &changed(&former, &[(100, 1), (108, 1)])), 4 + 9, "one row");
        assert_eq!(check(&former, &changed(&former, &[(100, 1), (109, 1)])), 5 + 5, "two rows");
        assert_eq!(check(&former, &vec![8; 4096]), 4096, "the image is shorter");
        assert_eq!(check(&vec![7; 65_536], &vec![8; 65_536]), 65_536);
        assert_eq!(check(&vec![7; 65_536], &changed(&vec![7; 65_536], &[(65_535, 1)])), 5, "the longest way to a row");
    }

    #[test]
    fn what_is_of_another_page_is_refused() {
        let mut page = vec![0; 512];
        let mut scratch = Vec::new();
        assert!(matches!(Content::of(&[1; 512], None, &mut scratch), Content::Image(_)));
        assert!(Content::Image(&[0; 511]).apply_to(&mut page).is_err());
        for bad in [&[0][..], &[0, 0, 2, 0, 1], &[0, 2, 1, 0, 1], &[255, 1, 2, 0, 1, 1], &[0, 0, 0]] {
            assert!(Content::Changes(bad).apply_to(&mut page).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn every_page_comes_back(
            former in prop::collection::vec(0_u8..3, 512),
            at in prop::collection::vec((0_usize..512, 0_u8..3), 0..40),
            moved in 0_usize..512,
        ) {
            let image = changed(&former, &at);
            check(&former, &image);
            let mut rotated = former.clone();
            rotated[moved..].rotate_right((512 - moved).min(2));
            check(&former, &rotated);
        }
    }
}
