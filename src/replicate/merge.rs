//! Merging: many small segments of a minute, then of an hour, become one that holds every transaction of theirs. From local
//! files alone: a segment that is confirmed stays on the disk until it can't be merged any more.
//!
//! The small ones are not deleted here. As soon as the large one is confirmed they are superseded, because whoever reads
//! takes the segment that goes furthest (`restore::run`); pruning takes them away later.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufWriter};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::spool::Spooled;
use crate::format::block::{BLOCK_HEADER_LEN, BlockHeader, Compression};
use crate::format::change::Content;
use crate::format::key::SegmentKey;
use crate::format::segment::{PageStream, Run, SegmentFooter, SegmentWriter, Table, Transaction};
use crate::format::{FOOTER_LEN, FormatError};

/// So many runs become one at a time. Each needs memory to be read: a block of 128 KiB, raw and compressed, and what zstd takes.
const RUNS_AT_A_TIME: usize = 16;

/// A segment of so many bytes is merged with no other: changes hardly become smaller any more, it is no small object, and each byte that
/// is merged is compressed and uploaded once more.
const LARGE_BYTES: u64 = 4 << 20;

/// What is merged, and how much may be kept for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeSettings {
    /// Segments whose last commits are in one window of such a length become one; ascending. Empty: nothing is merged.
    pub windows: Vec<Duration>,
    /// No more bytes of confirmed segments than this are kept on the local disk.
    pub kept_limit_bytes: u64,
}

impl MergeSettings {
    /// What is as large as this is not merged again.
    fn large_bytes(&self) -> u64 {
        LARGE_BYTES.min(self.kept_limit_bytes / 4)
    }
}

/// What to do with the segments that are kept.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Make these one.
    Merge(Range<usize>),
    /// Make these one, and do not keep it: to merge it again would cost more each time.
    MergeForGood(Range<usize>),
    /// There is nothing more to gain by keeping this one.
    LetGo(usize),
    /// Nothing, until more is confirmed.
    Wait,
}

/// The next step for `kept` (in the order of their keys), when everything up to `newest_ms` is confirmed.
///
/// A window is over when something later is confirmed: the clock plays no part, so a database that nobody writes to causes no
/// request.
#[must_use]
pub fn next_step(kept: &[Spooled], settings: &MergeSettings, newest_ms: u64) -> Step {
    let Some(coarsest) = settings.windows.last() else {
        return if kept.is_empty() { Step::Wait } else { Step::LetGo(0) };
    };
    for window in &settings.windows {
        let ripe = |group: &Range<usize>| {
            group.len() > 1 && window_of(&kept[group.start], *window) < newest_ms / window_ms(*window)
        };
        if let Some(group) = groups(kept, *window, settings).into_iter().find(ripe) {
            return Step::Merge(group);
        }
    }
    let coarse_groups = groups(kept, *coarsest, settings);
    let is_done = |group: &&Range<usize>| {
        group.len() == 1
            && (is_large(&kept[group.start], settings)
                || window_of(&kept[group.start], *coarsest) < newest_ms / window_ms(*coarsest))
    };
    if let Some(group) = coarse_groups.iter().find(is_done) {
        return Step::LetGo(group.start);
    }
    let kept_bytes: u64 = kept.iter().map(|spooled| spooled.len_bytes).sum();
    if kept_bytes <= settings.kept_limit_bytes {
        return Step::Wait;
    }
    // Too much for the window to be waited out.
    let len_of = |group: &Range<usize>| kept[group.clone()].iter().map(|spooled| spooled.len_bytes).sum::<u64>();
    match coarse_groups.into_iter().filter(|group| group.len() > 1).max_by_key(len_of) {
        Some(group) => Step::MergeForGood(group),
        None => Step::LetGo(0),
    }
}

fn window_ms(window: Duration) -> u64 {
    u64::try_from(window.as_millis()).unwrap_or(u64::MAX).max(1)
}

fn window_of(spooled: &Spooled, window: Duration) -> u64 {
    spooled.key.0.time_ms / window_ms(window)
}

fn is_large(spooled: &Spooled, settings: &MergeSettings) -> bool {
    spooled.len_bytes >= settings.large_bytes()
}

/// Runs of segments that follow each other without a gap, in one window. A large one stands alone.
fn groups(kept: &[Spooled], window: Duration, settings: &MergeSettings) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    for (index, spooled) in kept.iter().enumerate() {
        let belongs = |before: &Spooled| {
            let (before_span, span) = (before.key.0, spooled.key.0);
            before_span.epoch == span.epoch
                && before_span.last_txid + 1 == span.first_txid
                && window_of(before, window) == window_of(spooled, window)
                && !is_large(before, settings)
                && !is_large(spooled, settings)
        };
        match groups.last_mut() {
            Some(group) if belongs(&kept[group.end - 1]) => group.end = index + 1,
            _ => groups.push(index..index + 1),
        }
    }
    groups
}

/// Of kept segments those that another one holds whole: an earlier run was ended between a merge and its cleaning up.
#[must_use]
pub fn held_by_others(kept: &[Spooled]) -> Vec<usize> {
    let holds = |outer: &Spooled, inner: &Spooled| {
        let (outer, inner) = (outer.key.0, inner.key.0);
        outer != inner
            && outer.epoch == inner.epoch
            && (outer.first_txid..=outer.last_txid).contains(&inner.first_txid)
            && inner.last_txid <= outer.last_txid
    };
    (0..kept.len()).filter(|&index| kept.iter().any(|outer| holds(outer, &kept[index]))).collect()
}

/// Makes one segment of `inputs`, which follow each other, in the empty file `output`; gives its key. As many runs as memory
/// allows become one; the next merge goes on from there.
///
/// # Errors
/// When a file can't be read or is damaged, or the output can't be written.
pub fn merge_files(inputs: &[PathBuf], output: File) -> io::Result<SegmentKey> {
    let inputs = inputs.iter().map(|path| SegmentFile::open(path)).collect::<io::Result<Vec<_>>>()?;
    let Some(first) = inputs.first() else { return Err(io::Error::other("there is nothing to merge")) };
    let file = BufWriter::with_capacity(256 * 1024, output);
    let mut writer = SegmentWriter::with_compression(file, first.footer.page_size, Compression::MergedPages)?;
    let run_count: usize = inputs.iter().map(|input| input.footer.run_count as usize).sum();
    // Parts of like size: the last one is not to be a single small run.
    let part = run_count.div_ceil(run_count.div_ceil(RUNS_AT_A_TIME));
    let (mut transactions, mut cursors) = (Vec::new(), Vec::new());
    for input in &inputs {
        let table = input.table()?;
        let mut rest = table.transactions.into_iter();
        for run in table.runs {
            let start = transactions.len();
            transactions.extend(rest.by_ref().take(run.transactions.len()));
            cursors.push(Cursor::new(input, &transactions[start..], &run)?);
            if cursors.len() == part {
                merge_runs(&mut writer, &std::mem::take(&mut transactions), std::mem::take(&mut cursors))?;
            }
        }
    }
    merge_runs(&mut writer, &transactions, cursors)?;
    Ok(writer.finish(first.footer.span.epoch, first.footer.span.first_txid)?.1)
}

/// Makes one run of several, which follow each other and hold these transactions.
fn merge_runs(
    writer: &mut SegmentWriter<BufWriter<File>>,
    transactions: &[Transaction],
    mut cursors: Vec<Cursor<'_>>,
) -> io::Result<()> {
    if transactions.is_empty() {
        return Ok(());
    }
    writer.begin_run(transactions.iter().map(Transaction::parts))?;
    // By page number; where several runs hold a page, the older run comes first.
    let next = |(index, cursor): (usize, &Cursor<'_>)| Some(Reverse((cursor.pages.next_place()?.page_number, index)));
    let mut heap: BinaryHeap<Reverse<(u32, usize)>> = cursors.iter().enumerate().filter_map(next).collect();
    while let Some(Reverse((_, index))) = heap.pop() {
        let cursor = &mut cursors[index];
        writer.push(cursor.next_content()?)?;
        match cursor.pages.next_place() {
            Some(place) => heap.push(Reverse((place.page_number, index))),
            None => cursor.check_end()?,
        }
    }
    Ok(())
}

/// A segment in a local file.
struct SegmentFile {
    file: File,
    footer: SegmentFooter,
}

fn damaged(error: FormatError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl SegmentFile {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len_bytes = file.metadata()?.len();
        let mut tail = [0; FOOTER_LEN];
        file.read_exact_at(&mut tail, len_bytes.saturating_sub(FOOTER_LEN as u64))?;
        let footer = SegmentFooter::decode(&tail, len_bytes).map_err(damaged)?;
        Ok(Self { file, footer })
    }

    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn table(&self) -> io::Result<Table> {
        let table = self.read(self.footer.table_offset(), self.footer.table_len as usize)?;
        self.footer.decode_table(&table).map_err(damaged)
    }
}

/// A place in a run, every block of which is checked when it is reached.
struct Cursor<'a> {
    input: &'a SegmentFile,
    pages: PageStream,
    at: u64,
    end: u64,
}

impl<'a> Cursor<'a> {
    fn new(input: &'a SegmentFile, transactions: &[Transaction], run: &Run) -> io::Result<Self> {
        let pages = PageStream::new(input.footer.page_size, run.places(transactions)).map_err(damaged)?;
        Ok(Self { input, pages, at: run.bytes.start, end: run.bytes.end })
    }

    fn next_content(&mut self) -> io::Result<Content<'_>> {
        while !self.pages.has_content() && self.at < self.end {
            let header = self.input.read(self.at, BLOCK_HEADER_LEN)?;
            let header = BlockHeader::decode(&header, "a kept block").map_err(damaged)?;
            let block = self.input.read(self.at, BLOCK_HEADER_LEN + header.compressed_len)?;
            self.at += self.pages.read_block(&block).map_err(damaged)? as u64;
        }
        let (_, content) =
            self.pages.next_content().ok_or_else(|| io::Error::other("it has fewer pages than its table"))?;
        Ok(content)
    }

    fn check_end(&self) -> io::Result<()> {
        if self.at == self.end && !self.pages.has_content() {
            Ok(())
        } else {
            Err(io::Error::other("it has more pages than its table"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::key::Span;

    const MINUTE: Duration = Duration::from_secs(60);
    const HOUR: Duration = Duration::from_secs(3600);

    fn kept(epoch: u32, first_txid: u64, last_txid: u64, second: u64, len_bytes: u64) -> Spooled {
        let span = Span { epoch, first_txid, last_txid, time_ms: second * 1000 };
        Spooled { key: SegmentKey(span), path: PathBuf::new(), len_bytes }
    }

    fn settings() -> MergeSettings {
        MergeSettings { windows: vec![MINUTE, HOUR], kept_limit_bytes: 1000 }
    }

    fn step(kept: &[Spooled], newest_second: u64) -> Step {
        next_step(kept, &settings(), newest_second * 1000)
    }

    #[test]
    fn a_minute_that_is_over_is_merged_and_then_an_hour() {
        let minute = [kept(1, 1, 3, 10, 5), kept(1, 4, 4, 20, 5), kept(1, 5, 9, 59, 5)];
        assert_eq!(step(&minute, 59), Step::Wait);
        assert_eq!(step(&minute, 60), Step::Merge(0..3));
        let hour = [kept(1, 1, 9, 59, 5), kept(1, 10, 20, 3000, 5), kept(1, 21, 22, 3601, 5)];
        assert_eq!(step(&hour[..2], 3599), Step::Wait);
        assert_eq!(step(&hour, 3601), Step::Merge(0..2));
        // An hour that is one segment is done.
        assert_eq!(step(&[kept(1, 1, 20, 3000, 5), hour[2].clone()], 3601), Step::LetGo(0));
        assert_eq!(step(&hour[2..], 3601), Step::Wait);
    }

    #[test]
    fn what_does_not_follow_is_not_merged() {
        assert_eq!(step(&[kept(1, 1, 3, 10, 5), kept(1, 5, 6, 20, 5)], 60), Step::Wait, "a gap");
        assert_eq!(step(&[kept(1, 1, 3, 10, 5), kept(2, 4, 6, 20, 5)], 60), Step::Wait, "another epoch");
        assert_eq!(step(&[kept(1, 1, 3, 10, 5), kept(2, 4, 6, 20, 5)], 3600), Step::LetGo(0));
    }

    #[test]
    fn the_disk_is_not_filled() {
        let many: Vec<Spooled> = (0..6).map(|number| kept(1, number + 1, number + 1, 10, 200)).collect();
        assert_eq!(step(&many[..5], 10), Step::Wait);
        assert_eq!(step(&many, 10), Step::MergeForGood(0..6));
        let large = [kept(1, 1, 1, 10, 250), kept(1, 2, 2, 11, 10)];
        assert_eq!(step(&large, 11), Step::LetGo(0));
        let apart: Vec<Spooled> = (0..6).map(|number| kept(1, number * 2, number * 2, 10, 200)).collect();
        assert_eq!(step(&apart, 10), Step::LetGo(0));
        let off = MergeSettings { windows: Vec::new(), ..settings() };
        assert_eq!(next_step(&apart, &off, 10_000), Step::LetGo(0));
    }

    #[test]
    fn what_a_merge_left_behind_is_found() {
        let all = [kept(1, 1, 9, 59, 5), kept(1, 1, 3, 10, 5), kept(1, 4, 9, 59, 5), kept(2, 4, 9, 59, 5)];
        assert_eq!(held_by_others(&all), [1, 2]);
        assert!(held_by_others(&all[1..]).is_empty());
    }
}
