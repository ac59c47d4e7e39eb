//! Writes pages: no zeroes, and what is the same once.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::path::Path;

use zerocopy::IntoBytes;

use super::layout::{Encoding, PagesHeader, Run};
use super::persist::Progress;
use super::{Error, Result};
use crate::memory::{PAGE, Ranges, Span};
use crate::record::{Context, Kind, ObjectId};

/// Pages in a record: what is read of the disk at least for one of them.
const PAGES: usize = 64;

const LEN: usize = PAGE as usize;

/// Most pages that others are compared with: what is known of them takes some 40 bytes each.
const MOST_KNOWN: usize = 4 << 20;

/// Hashes what is a checksum already.
#[derive(Debug, Default)]
struct Mixed(u64);

impl Hasher for Mixed {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("checksums are numbers")
    }
    fn write_u32(&mut self, value: u32) {
        // The upper bits count, too.
        self.0 = u64::from(value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// What has pages.
pub(super) trait Content {
    /// The object that they are of.
    fn id(&self) -> ObjectId;
    /// What it is, for messages.
    fn name(&self) -> String;
    /// Whether reading again gives the same.
    fn is_stable(&self) -> bool;
    /// Reads ranges of them, one after the other, into `buffer`.
    fn read(&self, spans: &[Span], buffer: &mut [u8]) -> io::Result<()>;
}

/// Where a page was found first.
#[derive(Debug, Clone, Copy)]
struct First {
    record: u64,
    page: u32,
    content: u32,
    address: u64,
}

/// Writes the pages of one object after the other.
pub(super) struct Writer<'w> {
    context: &'w mut Context,
    path: &'w Path,
    encoding: Encoding,
    progress: &'w Progress,
    contents: &'w [Box<dyn Content + 'w>],
    /// By a checksum, which says only that they may be the same.
    known: HashMap<u32, First, BuildHasherDefault<Mixed>>,
    /// Pages that wait to be written as one record.
    waiting: Vec<u8>,
    records: u64,
}

impl<'w> Writer<'w> {
    pub(super) fn new(
        context: &'w mut Context,
        path: &'w Path,
        encoding: Encoding,
        progress: &'w Progress,
        contents: &'w [Box<dyn Content + 'w>],
    ) -> Self {
        Self {
            context,
            path,
            encoding,
            progress,
            contents,
            known: HashMap::default(),
            waiting: Vec::with_capacity(2 * PAGES * LEN),
            records: 0,
        }
    }

    /// How many records of pages were written.
    pub(super) fn records(&self) -> u64 {
        self.records
    }

    /// Writes the pages of `ranges` of one of the contents, and where they are.
    pub(super) fn write(&mut self, number: usize, ranges: &Ranges) -> Result<()> {
        let content = &self.contents[number];
        let mut index: Vec<Run> = Vec::new();
        let mut spans: Vec<Span> = Vec::new();
        let mut gathered = 0;
        for piece in ranges.pieces(PAGES as u64 * PAGE) {
            let mut rest = piece;
            while !rest.is_empty() {
                let room = (PAGES as u64 * PAGE) - gathered;
                let end = rest.end.min(rest.start + room);
                spans.push(Span {
                    start: rest.start,
                    end,
                });
                gathered += end - rest.start;
                rest.start = end;
                if gathered == PAGES as u64 * PAGE {
                    self.take(number, &spans, &mut index)?;
                    spans.clear();
                    gathered = 0;
                }
            }
        }
        self.take(number, &spans, &mut index)?;
        self.flush(content.id())?;
        let bytes = index.as_bytes();
        self.context
            .append(Kind::PageIndex, content.id(), &[bytes])
            .map(drop)
            .map_err(Error::image(self.path))
    }

    /// Takes pages, no more than go into a record.
    fn take(&mut self, number: usize, spans: &[Span], index: &mut Vec<Run>) -> Result<()> {
        self.progress.check()?;
        let content = &self.contents[number];
        let failed = |error| Error::Source {
            what: format!("cannot read {}", content.name()),
            error,
        };
        let len: u64 = spans.iter().map(Span::len).sum();
        let mut begin = self.waiting.len();
        self.waiting.resize(begin + len as usize, 0);
        content
            .read(spans, &mut self.waiting[begin..])
            .map_err(failed)?;
        // Pages move down over those that are not written.
        let mut from = begin;
        let pages = spans
            .iter()
            .flat_map(|span| (span.start..span.end).step_by(LEN));
        for address in pages {
            let page = &self.waiting[from..from + LEN];
            if *page == [0; LEN] {
                from += LEN;
                continue;
            }
            let checksum = crc32c::crc32c(page);
            let same = self.find(checksum, page, begin).map_err(failed)?;
            let (record, page) = if let Some(first) = same {
                (first.record, first.page)
            } else {
                let first = First {
                    record: self.context.stats().records,
                    page: (begin / LEN) as u32,
                    content: number as u32,
                    address,
                };
                if content.is_stable() && self.known.len() < MOST_KNOWN {
                    self.known.insert(checksum, first);
                }
                self.waiting.copy_within(from..from + LEN, begin);
                begin += LEN;
                (first.record, first.page)
            };
            from += LEN;
            push(index, address, record, page);
            if begin == PAGES * LEN {
                let rest = self.waiting.split_off(from);
                self.waiting.truncate(begin);
                self.flush(content.id())?;
                self.waiting.extend_from_slice(&rest);
                (begin, from) = (0, 0);
            }
        }
        self.waiting.truncate(begin);
        self.progress.advance(len);
        Ok(())
    }

    /// Looks for the same page among those written or waiting; of the latter the first `waiting` bytes count.
    fn find(&self, checksum: u32, page: &[u8], waiting: usize) -> io::Result<Option<First>> {
        let Some(first) = self.known.get(&checksum).copied() else {
            return Ok(None);
        };
        let is_same = if first.record == self.context.stats().records {
            let at = first.page as usize * LEN;
            debug_assert!(at < waiting, "it waits");
            self.waiting[at..at + LEN] == *page
        } else {
            let span = Span {
                start: first.address,
                end: first.address + PAGE,
            };
            let mut other = [0; LEN];
            self.contents[first.content as usize].read(&[span], &mut other)?;
            other == *page
        };
        Ok(is_same.then_some(first))
    }

    /// Writes what waits.
    fn flush(&mut self, id: ObjectId) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let pages = (self.waiting.len() / LEN) as u32;
        let packed =
            match self.encoding {
                Encoding::Plain => None,
                Encoding::Zstd => Some(zstd::bulk::compress(&self.waiting, 1).map_err(
                    |error| Error::Source {
                        what: "cannot compress pages".into(),
                        error,
                    },
                )?),
            };
        // What does not get smaller is better read as it is.
        let packed = packed.filter(|packed| packed.len() < self.waiting.len());
        let (encoding, bytes) = match &packed {
            Some(packed) => (Encoding::Zstd, packed.as_slice()),
            None => (Encoding::Plain, self.waiting.as_slice()),
        };
        let header = PagesHeader {
            encoding: encoding as u32,
            pages,
        };
        self.context
            .append(Kind::Pages, id, &[header.as_bytes(), bytes])
            .map_err(Error::image(self.path))?;
        self.records += 1;
        self.waiting.clear();
        Ok(())
    }
}

/// Adds a page to an index.
fn push(index: &mut Vec<Run>, address: u64, record: u64, page: u32) {
    match index.last_mut() {
        Some(last)
            if last.address + u64::from(last.pages) * PAGE == address
                && last.record == record
                && last.first + last.pages == page =>
        {
            last.pages += 1;
        }
        _ => index.push(Run {
            address,
            record,
            first: page,
            pages: 1,
        }),
    }
}
