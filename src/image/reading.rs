//! Contents of pages, read from an image when they are asked for.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::layout::Run;
use super::pages::{Decoded, Store};
use super::{Error, Result};
use crate::memory::{Lent, Look, PAGE, PageReader, Pages, Ranges, Span};
use crate::record::ObjectId;

/// Records whose contents are kept for the next pages that are asked for.
const KEPT: usize = 8;

/// The pages of one object of an image: an address space, shared memory, a file.
#[derive(Debug, Clone)]
pub struct StoredPages {
    store: Arc<Store>,
    id: ObjectId,
}

/// Contents by their record, the last used at the end.
#[derive(Debug, Default)]
pub(super) struct Records(VecDeque<(u64, Decoded)>);

impl Records {
    fn get(&mut self, store: &Store, record: u64) -> Result<&[u8]> {
        let found = self.0.iter().position(|(of, _)| *of == record);
        let kept = match found.and_then(|at| self.0.remove(at)) {
            Some(kept) => kept,
            None => {
                let (_, mut decoded) = match self.0.len() {
                    ..KEPT => Default::default(),
                    KEPT.. => self.0.pop_front().unwrap_or_default(),
                };
                store.decode(record, &mut decoded)?;
                (record, decoded)
            }
        };
        self.0.push_back(kept);
        Ok(self.0.back().map_or(&[], |(_, decoded)| decoded.bytes()))
    }
}

impl StoredPages {
    pub(super) fn new(store: Arc<Store>, id: ObjectId) -> Self {
        Self { store, id }
    }

    /// Reads ranges one after the other into `buffer`; what is not there reads as zeroes.
    ///
    /// # Errors
    ///
    /// What is read is damaged, or can't be read. The contents of `buffer` mean nothing then.
    pub fn read(&self, spans: &[Span], buffer: &mut [u8]) -> Result<()> {
        self.read_with(&mut Records::default(), spans, buffer)
    }

    pub(super) fn read_with(
        &self,
        records: &mut Records,
        spans: &[Span],
        buffer: &mut [u8],
    ) -> Result<()> {
        let mut rest = buffer;
        for span in spans {
            let (here, after) = rest.split_at_mut(span.len() as usize);
            self.look(records, *span, &mut |part, bytes| {
                let from = (part.start - span.start) as usize;
                let here = &mut here[from..from + part.len() as usize];
                match bytes {
                    Some(bytes) => here.copy_from_slice(bytes),
                    None => here.fill(0),
                }
                Ok::<_, Error>(())
            })?;
            rest = after;
        }
        Ok(())
    }

    /// Gives `each` the parts of a span.
    fn look<E: From<Error>>(
        &self,
        records: &mut Records,
        span: Span,
        each: &mut Look<'_, E>,
    ) -> std::result::Result<(), E> {
        let store = &self.store;
        let runs = store.index(self.id).unwrap_or_default();
        let end_of = |run: &Run| run.address + u64::from(run.pages) * PAGE;
        let from = runs.partition_point(|run| end_of(run) <= span.start);
        let mut at = span.start;
        for run in runs[from..].iter().take_while(|run| run.address < span.end) {
            let (start, end) = (run.address.max(span.start), end_of(run).min(span.end));
            if at < start {
                let zero = Span {
                    start: at,
                    end: start,
                };
                each(zero, None)?;
            }
            let contents = records.get(store, run.record)?;
            let offset = (u64::from(run.first) * PAGE + (start - run.address)) as usize;
            let found = contents.get(offset..offset + (end - start) as usize);
            let found = found.ok_or_else(|| {
                store.wrong(format!(
                    "the page at {start:#x} of object {} would be after the end of record {}",
                    self.id, run.record
                ))
            })?;
            each(Span { start, end }, Some(found))?;
            at = end;
        }
        if at < span.end {
            let zero = Span {
                start: at,
                end: span.end,
            };
            each(zero, None)?;
        }
        Ok(())
    }
}

impl Pages for StoredPages {
    fn reader(&self) -> Box<dyn PageReader + '_> {
        let reader = Reader {
            pages: self,
            records: Records::default(),
        };
        Box::new(reader)
    }
}

/// Who reads pages one after the other.
struct Reader<'p> {
    pages: &'p StoredPages,
    records: Records,
}

impl PageReader for Reader<'_> {
    fn look(&mut self, span: Span, each: &mut Look<'_>) -> io::Result<()> {
        self.pages.look(&mut self.records, span, each)
    }
}

/// The pages of an address space of which a shadow of another keeper's has the most.
#[derive(Debug)]
pub(super) struct Borrowed {
    stored: StoredPages,
    lent: Arc<Lent>,
}

impl Borrowed {
    pub(super) fn new(stored: StoredPages, lent: Arc<Lent>) -> Self {
        Self { stored, lent }
    }
}

impl Pages for Borrowed {
    fn reader(&self) -> Box<dyn PageReader + '_> {
        Box::new(Borrower {
            stored: self.stored.reader(),
            lent: &self.lent,
            bytes: Vec::new(),
        })
    }
}

/// Who reads these.
struct Borrower<'p> {
    stored: Box<dyn PageReader + 'p>,
    lent: &'p Lent,
    bytes: Vec<u8>,
}

impl PageReader for Borrower<'_> {
    fn look(&mut self, span: Span, each: &mut Look<'_>) -> io::Result<()> {
        /// Bytes read at once: they should still be in a cache when they are written.
        const PIECE: u64 = 256 << 10;
        let Self {
            stored,
            lent,
            bytes,
        } = self;
        let mut at = span.start;
        for part in lent.ranges().within(span) {
            if at < part.start {
                let before = Span {
                    start: at,
                    end: part.start,
                };
                stored.look(before, each)?;
            }
            at = part.end;
            for piece in Ranges::from_iter([part]).pieces(PIECE) {
                bytes.resize(piece.len() as usize, 0);
                lent.read(piece, bytes)?;
                each(piece, Some(bytes))?;
            }
        }
        let after = Span {
            start: at,
            end: span.end,
        };
        match after.is_empty() {
            true => Ok(()),
            false => stored.look(after, each),
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}
