//! What a container is made of: the records of a checkpoint, and its memory.

use std::path::PathBuf;
use std::sync::Arc;

use nix::unistd::Pid;

use crate::checkpoint::{Checkpoint, Result};
use crate::kernel::maps::{self, Vma};
use crate::memory::{AddressSpaceHeader, Pages, Ranges, SpaceImage};
use crate::outcome::Refusal;
use crate::record::{Context, Error, Kind, ObjectId};
use crate::task;

/// A checkpoint that was taken elsewhere.
#[derive(Debug)]
pub struct Origin<'a> {
    /// Its records.
    pub context: &'a Context,
    /// Its address spaces.
    pub spaces: Vec<Original>,
}

/// An address space of it.
#[derive(Debug)]
pub struct Original {
    /// The object id of its records.
    pub id: ObjectId,
    /// The program's path in the container.
    pub program: PathBuf,
    /// The text of its `smaps` (proc_pid_smaps(5)).
    pub smaps: String,
    /// Its guards (`MADV_GUARD_INSTALL`).
    pub guards: Ranges,
    /// Its auxiliary vector.
    pub auxv: Vec<u8>,
    /// Its pages.
    pub pages: Arc<dyn Pages>,
}

impl<'a> Origin<'a> {
    /// A checkpoint in RAM.
    pub(crate) fn of(checkpoint: &'a Checkpoint) -> Result<Self> {
        let original = |image: &SpaceImage| -> Result<Original> {
            if !image.kept.is_empty() {
                return Err(Refusal {
                    object: "MADV_DONTFORK memory".into(),
                    holder: format!("pid {}", image.pid),
                    remedy: "persist the checkpoint, and make the container of the image".into(),
                }
                .into());
            }
            Ok(Original {
                id: image.id,
                program: image.program_path()?,
                smaps: image.source.smaps()?,
                guards: image.guards()?.clone(),
                auxv: image.source.auxv()?,
                pages: Arc::new(image.shadow()?.pages()?),
            })
        };
        Ok(Self {
            context: &checkpoint.context,
            spaces: checkpoint
                .spaces
                .iter()
                .map(original)
                .collect::<Result<_>>()?,
        })
    }
}

impl Origin<'_> {
    /// The processes and threads in its records.
    pub(super) fn recorded(&self, renamed: &task::Renamed) -> Result<task::Recorded<'_>> {
        Ok(task::Recorded::read(self.context, renamed)?)
    }

    /// The address space of a recorded process.
    pub(super) fn space_of(&self, recorded: Pid) -> Result<Option<&Original>> {
        for original in &self.spaces {
            let header = self.header(original.id)?;
            if header.pid == recorded.as_raw() as u32 {
                return Ok(Some(original));
            }
        }
        Ok(None)
    }

    fn header(&self, id: ObjectId) -> Result<&AddressSpaceHeader> {
        Ok(self.find(Kind::AddressSpace, id)?.fixed()?.0)
    }

    /// The VMAs of an address space, without the window.
    pub(super) fn vmas(&self, id: ObjectId) -> Result<Vec<Vma>> {
        let header = self.header(id)?;
        let record = self.find(Kind::VmaList, id)?;
        let mut vmas = maps::parse(record.payload()).ok_or_else(|| Error::Payload {
            kind: Kind::VmaList,
            id,
            problem: "it is no list of VMAs".into(),
        })?;
        vmas.retain(|vma| vma.start < header.window_start || vma.end > header.window_end);
        Ok(vmas)
    }

    fn find(&self, kind: Kind, id: ObjectId) -> Result<crate::record::Record<'_>> {
        let missing = || Error::Payload {
            kind,
            id,
            problem: "it is missing".into(),
        };
        Ok(self.context.find(kind, id).ok_or_else(missing)?)
    }

    /// Refuses memory that can't be made of an image.
    pub(super) fn check_memory(&self) -> Result<()> {
        for original in &self.spaces {
            let pid = self.header(original.id)?.pid;
            for vma in self.vmas(original.id)? {
                let problem = if vma.is_special() {
                    continue;
                } else if vma.is_segment() {
                    "System V shared memory"
                } else if vma.name.ends_with(b" (deleted)") {
                    "memory of a file that was deleted, or shared memory"
                } else if vma.name.starts_with(b"/dev/") && !vma.is_anonymous() {
                    "memory of a device or in /dev/shm"
                } else {
                    continue;
                };
                return Err(Refusal {
                    object: format!("{problem}: {vma:?}"),
                    holder: format!("pid {pid}"),
                    remedy: "it can't be made of an image yet; take the checkpoint without it"
                        .into(),
                }
                .into());
            }
        }
        Ok(())
    }
}
