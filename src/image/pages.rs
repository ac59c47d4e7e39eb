//! The memory file of an image: its records of pages, and where each page is.

use std::collections::BTreeMap;
use std::path::PathBuf;

use zerocopy::FromBytes;

use super::layout::{Encoding, MOST_PAGES, PagesHeader, Run};
use super::{Error, Result};
use crate::memory::PAGE;
use crate::record::{Frames, Kind, ObjectId};

/// The memory file of an image.
#[derive(Debug)]
pub(super) struct Store {
    frames: Frames,
    path: PathBuf,
    indexes: BTreeMap<ObjectId, Vec<Run>>,
}

/// Contents of a record of pages. Used again for another record it needs no new memory.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    /// The payload; what is in it is behind its header unless it was packed.
    pub(super) payload: Vec<u8>,
    /// What was packed.
    unpacked: Vec<u8>,
    is_packed: bool,
}

impl Decoded {
    /// The pages.
    pub(super) fn bytes(&self) -> &[u8] {
        match self.is_packed {
            true => &self.unpacked,
            false => self
                .payload
                .get(size_of::<PagesHeader>()..)
                .unwrap_or_default(),
        }
    }
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
        let mut decoded = Decoded::default();
        records.filter_map(move |frame| {
            let end = wanted.get(&frame.sequence()).copied().unwrap_or(0);
            match self.decode(frame.sequence(), &mut decoded) {
                Ok(()) if (decoded.bytes().len() as u64) < u64::from(end) * PAGE => {
                    let at = frame.position();
                    let problem = format!("{at}: there are fewer pages than its index says");
                    Some(self.wrong(problem))
                }
                Ok(()) => None,
                Err(error) => Some(error),
            }
        })
    }

    pub(super) fn wrong(&self, problem: String) -> Error {
        Error::Inconsistent {
            path: self.path.clone(),
            problem,
        }
    }

    /// Reads the contents of a record, and checks them.
    pub(super) fn decode(&self, record: u64, into: &mut Decoded) -> Result<()> {
        let frame = usize::try_from(record)
            .ok()
            .and_then(|number| self.frames.frames().get(number))
            .ok_or_else(|| self.wrong(format!("there is no record {record}")))?;
        self.frames
            .read_payload(frame, &mut into.payload)
            .map_err(Error::image(&self.path))?;
        unpack(into).map_err(|problem| self.wrong(format!("{}: {problem}", frame.position())))
    }
}

/// Takes the contents out of the payload of a `Pages` record.
pub(super) fn unpack(decoded: &mut Decoded) -> std::result::Result<(), String> {
    let (header, encoded) = PagesHeader::read_from_prefix(&decoded.payload)
        .map_err(|_| "shorter than its header".to_owned())?;
    if header.pages == 0 || header.pages > MOST_PAGES {
        return Err(format!("{} pages in one record", header.pages));
    }
    let len = header.pages as usize * PAGE as usize;
    decoded.is_packed = match Encoding::from_number(header.encoding) {
        None => return Err(format!("encoding {} is not known here", header.encoding)),
        Some(Encoding::Plain) => false,
        Some(Encoding::Zstd) => {
            decoded.unpacked.resize(len, 0);
            let found = zstd::bulk::decompress_to_buffer(encoded, &mut decoded.unpacked)
                .map_err(|error| format!("its contents can't be unpacked: {error}"))?;
            decoded.unpacked.truncate(found);
            true
        }
    };
    match decoded.bytes().len() {
        found if found == len => Ok(()),
        found => Err(format!(
            "{} pages are {len} bytes, and there are {found}",
            header.pages,
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
