//! What of a checkpoint is to be written out, apart from the checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use super::layout::{Info, NamelessFile};
use super::{Error, Result};
use crate::checkpoint::Checkpoint;
use crate::filesystem::StoredArea;
use crate::filesystem::store::Kept;
use crate::memory::{Segments, SharedContent, SpaceContent};
use crate::objects;
use crate::objects::state::State;
use crate::record::{Context, Kind, ObjectId};

/// All of a checkpoint, to be written out on any thread. The checkpoint can be rolled back to meanwhile; if it is released
/// the writing fails.
#[derive(Debug)]
pub struct Parts {
    pub(super) info: Info,
    pub(super) context: Arc<Context>,
    pub(super) spaces: Vec<SpaceContent>,
    pub(super) shared: Vec<SharedContent>,
    pub(super) segments: Segments,
    pub(super) nameless: Vec<Nameless>,
    pub(super) files: Vec<(StoredArea, Vec<Arc<Kept>>)>,
}

/// A file without a name, and what is in it.
#[derive(Debug)]
pub(super) struct Nameless {
    pub(super) file: NamelessFile,
    pub(super) content: NamelessContent,
}

#[derive(Debug)]
pub(super) enum NamelessContent {
    /// As it was at the checkpoint.
    Kept(Arc<Kept>),
    /// As it is: an `O_PATH` descriptor.
    Live(File),
}

impl Parts {
    /// Takes them; to be called on the thread that owns the checkpoint. Nothing is stopped.
    ///
    /// # Errors
    ///
    /// A shadow is dead, or there is not enough memory or descriptors.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let context = &checkpoint.context;
        let content = |image| SpaceContent::of(image, context);
        let nameless = nameless(checkpoint)?;
        Ok(Self {
            info: Info::of(checkpoint),
            context: Arc::clone(context),
            spaces: checkpoint
                .spaces
                .iter()
                .map(content)
                .collect::<crate::memory::Result<_>>()?,
            shared: checkpoint
                .shared
                .iter()
                .map(|shared| shared.content())
                .collect(),
            segments: checkpoint.segments.clone(),
            nameless,
            files: checkpoint
                .files
                .areas
                .iter()
                .map(|area| area.stored())
                .collect(),
        })
    }

    /// The greatest id that the context has given out: what is numbered here is above it.
    pub(super) fn last_id(&self) -> u64 {
        let records = self.context.records();
        records.map(|record| record.id().raw()).max().unwrap_or(1)
    }

    /// Objects of shared memory, by device and inode.
    pub(super) fn shared_inodes(&self) -> Result<BTreeSet<(u64, u64)>> {
        let records = self.context.records_of(Kind::SharedMemory);
        let inode = |record: crate::record::Record<'_>| {
            let (object, _) = record.fixed::<crate::memory::SharedObject>()?;
            Ok((object.device, object.inode))
        };
        records
            .map(inode)
            .collect::<crate::record::Result<_>>()
            .map_err(|error| Error::Memory(error.into()))
    }
}

impl Info {
    /// That of a checkpoint in RAM.
    pub(super) fn of(checkpoint: &Checkpoint) -> Self {
        let since = checkpoint.taken_at.duration_since(UNIX_EPOCH);
        let files = &checkpoint.files;
        let areas = files.areas.iter();
        let left_out = files.left_out.iter();
        Self {
            name: checkpoint.name.clone(),
            taken_ns: since.unwrap_or_default().as_nanos() as u64,
            processes: checkpoint.processes,
            threads: checkpoint.threads,
            resident_pages: checkpoint.resident_pages,
            page_records: 0,
            nameless_files: 0,
            files: areas.map(|area| area.area.mount_point.clone()).collect(),
            left_out: left_out
                .map(|mount| (mount.mount_point.clone(), mount.why.clone()))
                .collect(),
        }
    }
}

/// The regular files that are open and have no name.
fn nameless(checkpoint: &Checkpoint) -> Result<Vec<Nameless>> {
    let recorded = &checkpoint.objects.recorded;
    let mut found: BTreeMap<(u64, u64), Nameless> = BTreeMap::new();
    for (id, pin) in &checkpoint.objects.pins {
        let Some((path, inode)) = recorded.descriptions.get(id).and_then(plain) else {
            continue;
        };
        if let Some(known) = found.get_mut(&inode) {
            known.file.descriptions.push(*id);
            continue;
        }
        let failed = |error| Error::Source {
            what: format!("cannot look at the open file {}", path.display()),
            error,
        };
        let pin = File::from(pin.try_clone().map_err(failed)?);
        let metadata = pin.metadata().map_err(failed)?;
        if metadata.nlink() > 0 || !metadata.is_file() {
            continue;
        }
        let kept = checkpoint.files.areas.iter();
        let kept = kept
            .flat_map(|area| &area.nameless)
            .find(|file| file.meta.stat.shown == inode);
        let mut file = describe(&metadata, path, vec![*id]);
        let content = match kept {
            Some(kept) => {
                let stat = &kept.meta.stat;
                file = NamelessFile {
                    mode: stat.mode,
                    uid: stat.uid,
                    gid: stat.gid,
                    size: kept.content.size,
                    modified_ns: stat.mtime.0 * 1_000_000_000 + i64::from(stat.mtime.1),
                    of_checkpoint: true,
                    ..file
                };
                NamelessContent::Kept(Arc::clone(&kept.content))
            }
            None => NamelessContent::Live(pin),
        };
        // The recorded number may be another than that of now, if it was made again since.
        (file.device, file.inode) = inode;
        found.insert(inode, Nameless { file, content });
    }
    Ok(found.into_values().collect())
}

/// The path and inode of a description, if it is one of a plain file.
fn plain(description: &objects::model::Description) -> Option<(PathBuf, (u64, u64))> {
    match &description.state {
        State::File(file) if file.form == objects::file::Form::Plain => {
            let path = file.path.strip_suffix(DELETED).unwrap_or(&file.path);
            Some((path.into(), description.common.inode()))
        }
        _ => None,
    }
}

/// How `/proc` marks a file without a name.
pub(super) const DELETED: &str = " (deleted)";

/// What is known of a file without a name.
pub(super) fn describe(
    metadata: &std::fs::Metadata,
    path: PathBuf,
    descriptions: Vec<ObjectId>,
) -> NamelessFile {
    NamelessFile {
        device: metadata.dev(),
        inode: metadata.ino(),
        path,
        descriptions,
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        size: metadata.len(),
        modified_ns: metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec(),
        of_checkpoint: false,
    }
}
