//! Reading an image.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::layout::{Info, NamelessFile, Run};
use super::pages::Store;
use super::reading::{Borrowed, Records, StoredPages};
use super::space::StoredSpace;
use super::{CONTEXT_FILE, Error, MEMORY_FILE, Result};
use crate::filesystem::StoredArea;
use crate::memory::{Lent, Pages, Segments, SharedObject, Span};
use crate::outcome::Refusal;
use crate::record::{Context, Frames, Kind, ObjectId};

/// An image that was read: all headers, and where the pages are.
///
/// Everything was checked but the contents of pages, which are checked each time they are read.
#[derive(Debug)]
pub struct Opened {
    /// All headers.
    pub context: Arc<Context>,
    /// The checkpoint that it was made of.
    pub info: Info,
    /// The address spaces, by the ids of their records.
    pub spaces: BTreeMap<ObjectId, StoredSpace>,
    /// System V shared memory segments.
    pub segments: Segments,
    /// Files without a name that were open or mapped; their contents are pages.
    pub nameless: BTreeMap<ObjectId, NamelessFile>,
    /// The files that go back with the tree; contents are pages of the objects after each.
    pub files: Vec<(ObjectId, StoredArea)>,
    store: Arc<Store>,
    /// Contents that were read last.
    records: Mutex<Records>,
    /// Shadows that have pages.
    lent: BTreeMap<ObjectId, Arc<Lent>>,
}

impl Opened {
    /// Opens the image in a directory.
    ///
    /// # Errors
    ///
    /// There is none, or it is damaged: which file, record and offset.
    pub fn open(directory: &Path) -> Result<Self> {
        let opened = Self::read_all(directory)?;
        match opened.spaces.values().any(|space| space.lender.is_some()) {
            false => Ok(opened),
            true => Err(Refusal {
                object: "an image whose pages are in another container's checkpoint".into(),
                holder: directory.display().to_string(),
                remedy: "it is what `fork` has left that was killed; remove it, and use `persist` for an image".into(),
            }
            .into()),
        }
    }

    /// Opens the image in a directory, of which pages may be in shadows: it was written with
    /// [`Options::lend`](super::Options::lend).
    ///
    /// # Errors
    ///
    /// As [`Opened::open`]; or a shadow is gone.
    pub fn open_lent(directory: &Path) -> Result<Self> {
        let mut opened = Self::read_all(directory)?;
        for (id, space) in &mut opened.spaces {
            let Some((header, ranges)) = space.lender.take() else {
                continue;
            };
            let lent = Lent::open(header, ranges).map_err(|error| Error::Source {
                what: format!("cannot read a shadow, of process {}", header.pid),
                error,
            })?;
            opened.lent.insert(*id, Arc::new(lent));
        }
        Ok(opened)
    }

    fn read_all(directory: &Path) -> Result<Self> {
        let (path, file) = open_in(directory, CONTEXT_FILE)?;
        let context =
            Context::load(BufReader::with_capacity(1 << 20, file)).map_err(Error::image(&path))?;
        if let Some(reason) = context.failure() {
            return Err(Error::Inconsistent {
                path,
                problem: format!("the checkpoint had failed: {reason}"),
            });
        }
        let (path, file) = open_in(directory, MEMORY_FILE)?;
        let frames = Frames::open(file).map_err(Error::image(&path))?;
        Self::of(Arc::new(context), frames, path)
    }

    pub(super) fn of(context: Arc<Context>, frames: Frames, path: PathBuf) -> Result<Self> {
        let wrong = |problem: String| Error::Inconsistent {
            path: path.clone(),
            problem,
        };
        if context.image_header() != Some(*frames.image_header()) {
            return Err(wrong(format!(
                "it does not belong to the {CONTEXT_FILE} beside it"
            )));
        }
        let store = Store::new(frames, path.clone())?;
        let frames = store.frames();
        let json = |kind: Kind, id: ObjectId| -> Result<Option<Vec<u8>>> {
            let frame = frames.find(kind, id);
            frame
                .map(|frame| frames.payload(frame).map_err(Error::image(&path)))
                .transpose()
        };
        let bad = |kind: Kind| {
            let wrong = &wrong;
            move |error: serde_json::Error| wrong(format!("{kind}: {error}"))
        };
        let info = json(Kind::Checkpoint, ObjectId::IMAGE)?
            .ok_or_else(|| wrong("there is no checkpoint record".into()))?;
        let info: Info = serde_json::from_slice(&info).map_err(bad(Kind::Checkpoint))?;
        let count = |kind: Kind| {
            let of_kind = frames.frames().iter().filter(|frame| frame.kind() == kind);
            of_kind.count() as u64
        };
        for (kind, expected) in [
            (Kind::Pages, info.page_records),
            (Kind::NamelessFile, info.nameless_files),
            (Kind::FileArea, info.files.len() as u64),
        ] {
            if count(kind) != expected {
                return Err(wrong(format!(
                    "there are {} records of kind {kind}, and there were {expected}",
                    count(kind)
                )));
            }
        }
        let segments = json(Kind::Segments, ObjectId::IMAGE)?
            .ok_or_else(|| wrong("there is no record of segments".into()))?;
        let segments = serde_json::from_slice(&segments).map_err(bad(Kind::Segments))?;
        let mut spaces = BTreeMap::new();
        for record in context.records_of(Kind::AddressSpace) {
            spaces.insert(record.id(), StoredSpace::read(frames, &path, record.id())?);
        }
        let mut nameless = BTreeMap::new();
        for frame in frames.frames() {
            if frame.kind() == Kind::NamelessFile {
                let payload = frames.payload(frame).map_err(Error::image(&path))?;
                let file = serde_json::from_slice(&payload).map_err(bad(Kind::NamelessFile))?;
                nameless.insert(frame.id(), file);
            }
        }
        let mut files = Vec::new();
        for frame in frames.frames() {
            if frame.kind() == Kind::FileArea {
                let payload = frames.payload(frame).map_err(Error::image(&path))?;
                let area: StoredArea =
                    serde_json::from_slice(&payload).map_err(bad(Kind::FileArea))?;
                let told = |problem| wrong(format!("files, object {}: {problem}", frame.id()));
                area.check().map_err(told)?;
                files.push((frame.id(), area));
            }
        }
        let shared = context.records_of(Kind::SharedMemory);
        let owners = spaces.keys().chain(nameless.keys()).copied();
        let contents = files.iter().flat_map(|(id, area)| {
            let first = id.raw().saturating_add(1);
            let ids = first..=id.raw().saturating_add(area.contents);
            ids.filter_map(ObjectId::from_raw)
        });
        let shared = shared.map(|record| record.id());
        for id in owners.chain(shared).chain(contents) {
            if store.index(id).is_none() {
                return Err(wrong(format!("there is no page index of object {id}")));
            }
        }
        Ok(Self {
            context,
            info,
            spaces,
            segments,
            nameless,
            files,
            store: Arc::new(store),
            records: Mutex::default(),
            lent: BTreeMap::new(),
        })
    }

    /// The pages of an address space, an object of shared memory (by offset) or a nameless file (by offset).
    pub fn pages(&self, id: ObjectId) -> Arc<dyn Pages> {
        let stored = self.stored(id);
        match self.lent.get(&id) {
            None => Arc::new(stored),
            Some(lent) => Arc::new(Borrowed::new(stored, Arc::clone(lent))),
        }
    }

    fn stored(&self, id: ObjectId) -> StoredPages {
        StoredPages::new(Arc::clone(&self.store), id)
    }

    /// Where the pages of such an object are, in order of addresses. What is not there is zero.
    pub fn runs(&self, id: ObjectId) -> &[Run] {
        self.store.index(id).unwrap_or_default()
    }

    /// Reads ranges of what the image has of such an object, one after the other, into `buffer`; what is not there reads as
    /// zeroes.
    ///
    /// # Errors
    ///
    /// What is read is damaged, or can't be read.
    pub fn read(&self, id: ObjectId, spans: &[Span], buffer: &mut [u8]) -> Result<()> {
        let mut records = self.records.lock();
        self.stored(id).read_with(&mut records, spans, buffer)
    }

    /// The objects of shared memory: their records, and the names that they had.
    ///
    /// # Errors
    ///
    /// A record is not what it should be.
    pub fn shared(&self) -> Result<Vec<(ObjectId, SharedObject, String)>> {
        let records = self.context.records_of(Kind::SharedMemory);
        let read = |record: crate::record::Record<'_>| {
            let (object, name) = record.fixed::<SharedObject>()?;
            let name = String::from_utf8_lossy(name).into_owned();
            Ok((record.id(), *object, name))
        };
        records
            .map(read)
            .collect::<crate::record::Result<_>>()
            .map_err(Error::image(Path::new(CONTEXT_FILE)))
    }

    /// Checks the contents of all pages too.
    ///
    /// # Errors
    ///
    /// They are damaged: which record.
    pub fn verify(&self) -> Result<()> {
        self.store.problems().next().map_or(Ok(()), Err)
    }
}

/// Opens a file of an image; nothing but a plain file.
pub(super) fn open_in(directory: &Path, name: &str) -> Result<(PathBuf, File)> {
    let path = directory.join(name);
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(&path)
        .map_err(Error::file("open", &path))?;
    let metadata = file.metadata().map_err(Error::file("look at", &path))?;
    match metadata.is_file() {
        true => Ok((path, file)),
        false => Err(Error::Inconsistent {
            path,
            problem: "it is not a plain file".into(),
        }),
    }
}
