//! Contents of pages, read from an image when they are asked for.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use zerocopy::FromBytes;

use super::layout::{Encoding, MOST_PAGES, PagesHeader, Run};
use super::{Error, Result};
use crate::memory::{PAGE, Pages, Span};
use crate::record::{Frames, Kind, ObjectId};

/// Records whose contents are kept for the next pages that are asked for.
const CACHED: usize = 16;

/// The memory file of an image.
#[derive(Debug)]
pub(super) struct Store {
    frames: Frames,
    path: PathBuf,
    indexes: BTreeMap<ObjectId, Vec<Run>>,
    /// Contents by their record, the last used at the end.
    cache: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
}

/// The pages of one object of an image: an address space, shared memory, a file. Several threads may read at a time.
#[derive(Debug, Clone)]
pub struct StoredPages {
    store: Arc<Store>,
    id: ObjectId,
}

impl Store {
    /// Checks all indexes.
    pub(super) fn new(frames: Frames, path: PathBuf) -> Result<Self> {
        let mut indexes = BTreeMap::new();
        let of_kind = |frame: &&crate::record::Frame| frame.kind() == Kind::PageIndex;
        for frame in frames.frames().iter().filter(of_kind) {
            let payload = frames.payload(frame).map_err(Error::image(&path))?;
            let runs = runs(&frames, &payload).map_err(|problem| Error::Inconsistent {
                path: path.clone(),
                problem: format!("{}: {problem}", frame.position()),
            })?;
            indexes.insert(frame.id(), runs);
        }
        Ok(Self {
            frames,
            path,
            indexes,
            cache: Mutex::new(VecDeque::new()),
        })
    }

    pub(super) fn frames(&self) -> &Frames {
        &self.frames
    }

    /// Where the pages of an object are, by address.
    pub(super) fn index(&self, id: ObjectId) -> Option<&[Run]> {
        self.indexes.get(&id).map(Vec::as_slice)
    }

    /// Checks all contents: what is wrong, one after the other.
    pub(super) fn problems(&self) -> impl Iterator<Item = Error> {
        let mut wanted: BTreeMap<u64, u32> = BTreeMap::new();
        for run in self.indexes.values().flatten() {
            let end = wanted.entry(run.record).or_default();
            *end = (*end).max(run.first + run.pages);
        }
        let of_kind = |frame: &&crate::record::Frame| frame.kind() == Kind::Pages;
        let records = self.frames.frames().iter().filter(of_kind);
        records.filter_map(move |frame| {
            let end = wanted.get(&frame.sequence()).copied().unwrap_or(0);
            match self.decode(frame.sequence()) {
                Ok(contents) if (contents.len() as u64) < u64::from(end) * PAGE => {
                    let at = frame.position();
                    let problem = format!("{at}: there are fewer pages than its index says");
                    Some(self.wrong(problem))
                }
                Ok(_) => None,
                Err(error) => Some(error),
            }
        })
    }

    fn wrong(&self, problem: String) -> Error {
        Error::Inconsistent {
            path: self.path.clone(),
            problem,
        }
    }

    /// The contents of a record.
    fn contents(&self, record: u64) -> Result<Arc<Vec<u8>>> {
        let mut cache = self.cache.lock();
        if let Some(at) = cache.iter().position(|(of, _)| *of == record) {
            let found = cache.remove(at);
            cache.extend(found);
            if let Some((_, contents)) = cache.back() {
                return Ok(Arc::clone(contents));
            }
        }
        drop(cache);
        let contents = Arc::new(self.decode(record)?);
        let mut cache = self.cache.lock();
        if cache.len() >= CACHED {
            cache.pop_front();
        }
        cache.push_back((record, Arc::clone(&contents)));
        Ok(contents)
    }

    fn decode(&self, record: u64) -> Result<Vec<u8>> {
        let frame = usize::try_from(record)
            .ok()
            .and_then(|number| self.frames.frames().get(number))
            .ok_or_else(|| self.wrong(format!("there is no record {record}")))?;
        let mut payload = self
            .frames
            .payload(frame)
            .map_err(Error::image(&self.path))?;
        contents(&mut payload)
            .map_err(|problem| self.wrong(format!("{}: {problem}", frame.position())))
    }
}

/// Takes the contents out of the payload of a `Pages` record.
pub(super) fn contents(payload: &mut Vec<u8>) -> std::result::Result<Vec<u8>, String> {
    let (header, encoded) =
        PagesHeader::read_from_prefix(payload).map_err(|_| "shorter than its header".to_owned())?;
    if header.pages == 0 || header.pages > MOST_PAGES {
        return Err(format!("{} pages in one record", header.pages));
    }
    let len = header.pages as usize * PAGE as usize;
    let decoded = match Encoding::from_number(header.encoding) {
        None => return Err(format!("encoding {} is not known here", header.encoding)),
        Some(Encoding::Plain) => {
            payload.drain(..size_of::<PagesHeader>());
            std::mem::take(payload)
        }
        Some(Encoding::Zstd) => zstd::bulk::decompress(encoded, len)
            .map_err(|error| format!("its contents can't be unpacked: {error}"))?,
    };
    match decoded.len() == len {
        true => Ok(decoded),
        false => Err(format!(
            "{} pages are {len} bytes, and there are {}",
            header.pages,
            decoded.len()
        )),
    }
}

/// Reads an index and checks it as far as that goes without the contents.
fn runs(frames: &Frames, payload: &[u8]) -> std::result::Result<Vec<Run>, String> {
    let size = size_of::<Run>();
    if !payload.len().is_multiple_of(size) {
        return Err(format!("{} bytes are no list of runs", payload.len()));
    }
    let mut end = 0;
    let mut runs = Vec::with_capacity(payload.len() / size);
    for bytes in payload.chunks_exact(size) {
        let Ok(run) = Run::read_from_bytes(bytes) else {
            return Err("not a run".into());
        };
        let Run {
            address,
            record,
            first,
            pages,
        } = run;
        let wrong = |what: &str| Err(format!("the run at {address:#x} {what}"));
        if !address.is_multiple_of(PAGE) || address < end {
            return wrong("is not in order");
        }
        if pages == 0
            || first
                .checked_add(pages)
                .is_none_or(|last| last > MOST_PAGES)
        {
            return wrong("is longer than a record, or empty");
        }
        match address.checked_add(u64::from(pages) * PAGE) {
            Some(after) => end = after,
            None => return wrong("ends beyond all addresses"),
        }
        let number = usize::try_from(record).ok();
        let frame = number.and_then(|number| frames.frames().get(number));
        if frame.is_none_or(|frame| frame.kind() != Kind::Pages) {
            return wrong(&format!("refers to record {record}, which holds no pages"));
        }
        runs.push(run);
    }
    Ok(runs)
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
        let mut rest = buffer;
        for span in spans {
            let (here, after) = rest.split_at_mut(span.len() as usize);
            self.read_span(*span, here)?;
            rest = after;
        }
        Ok(())
    }

    fn read_span(&self, span: Span, buffer: &mut [u8]) -> Result<()> {
        let runs = self.store.index(self.id).unwrap_or_default();
        let end_of = |run: &Run| run.address + u64::from(run.pages) * PAGE;
        let from = runs.partition_point(|run| end_of(run) <= span.start);
        let mut at = span.start;
        for run in runs[from..].iter().take_while(|run| run.address < span.end) {
            let (start, end) = (run.address.max(span.start), end_of(run).min(span.end));
            let place = |address: u64| (address - span.start) as usize;
            buffer[place(at)..place(start)].fill(0);
            let contents = self.store.contents(run.record)?;
            let offset = (u64::from(run.first) * PAGE + (start - run.address)) as usize;
            let len = (end - start) as usize;
            let found = contents
                .get(offset..offset + len)
                .ok_or_else(|| Error::Inconsistent {
                    path: self.store.path.clone(),
                    problem: format!(
                        "the page at {start:#x} of object {} would be after the end of record {}",
                        self.id, run.record
                    ),
                })?;
            buffer[place(start)..place(end)].copy_from_slice(found);
            at = end;
        }
        buffer[(at - span.start) as usize..].fill(0);
        Ok(())
    }
}

impl Pages for StoredPages {
    fn read(&self, spans: &[Span], buffer: &mut [u8]) -> io::Result<()> {
        StoredPages::read(self, spans, buffer)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}
