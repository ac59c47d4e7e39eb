//! Where an address space is kept as it was: in a shadow, or in an image on disk.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use nix::unistd::Pid;

use crate::kernel::maps::{self, Vma};
use crate::kernel::pagemap::Scan;
use crate::kernel::procfs::{self, Bounds};
use crate::kernel::smaps;

use super::Result;
use super::layout::Layout;
use super::ranges::{Ranges, Span};
use super::shadow::Shadow;
use super::space::{refuse, system};

/// What holds the pages of an image, and what else of the address space no record tells.
#[derive(Debug)]
pub enum Source {
    /// A process that is a copy of it.
    Shadow(Shadow),
    /// An image that was persisted.
    Stored(Stored),
}

/// An address space as an image on disk has it.
#[derive(Debug)]
pub struct Stored {
    /// The text of the shadow's `/proc/PID/smaps`.
    pub smaps: String,
    /// Its guards (`MADV_GUARD_INSTALL`).
    pub guards: Ranges,
    /// Where the parts of the program are.
    pub bounds: Bounds,
    /// The auxiliary vector.
    pub auxv: Vec<u8>,
    /// The program, open.
    pub program: File,
    /// The files behind its mappings, open, by device and inode as recorded.
    pub files: BTreeMap<(u64, u64), File>,
    /// Its pages.
    pub pages: Arc<dyn Pages>,
}

/// Pages as they were.
pub trait Pages: std::fmt::Debug + Send + Sync {
    /// Reads ranges one after the other into `buffer`, which is as long as all of them. What is not there reads as zeroes.
    ///
    /// # Errors
    ///
    /// They can't be read, or are damaged.
    fn read(&self, spans: &[Span], buffer: &mut [u8]) -> std::io::Result<()>;
}

/// The VMAs of a source by which `/proc/PID/map_files` names them (none if it is no process), and the `VmFlags` of each.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) vmas: Vec<Vma>,
    pub(super) flags: Vec<smaps::Flags>,
}

impl Source {
    /// The shadow, if that is what it is.
    pub fn shadow(&self) -> Option<&Shadow> {
        match self {
            Self::Shadow(shadow) => Some(shadow),
            Self::Stored(_) => None,
        }
    }

    /// The shadow of the address space of `pid`, or a refusal.
    pub(super) fn resident(&self, pid: Pid) -> Result<&Shadow> {
        self.shadow().ok_or_else(|| {
            refuse(
                pid,
                "its memory",
                "it is in an image on disk only; restore that first",
            )
        })
    }

    /// Reads ranges of the address space as they were, one after the other, into `buffer`.
    ///
    /// # Errors
    ///
    /// The shadow or the image can't be read.
    pub fn read(&self, spans: &[Span], buffer: &mut [u8]) -> std::io::Result<()> {
        match self {
            Self::Shadow(shadow) => shadow.read(spans, buffer),
            Self::Stored(stored) => stored.pages.read(spans, buffer),
        }
    }

    /// The text of `smaps` (proc_pid_smaps(5)). Walks page tables, so that it takes time.
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn smaps(&self) -> Result<String> {
        match self {
            Self::Shadow(shadow) => {
                let text = std::fs::read(procfs::path(shadow.pid, "smaps"))
                    .map_err(|error| system(shadow.pid, "read the flags of a shadow", error))?;
                Ok(String::from_utf8_lossy(&text).into_owned())
            }
            Self::Stored(stored) => Ok(stored.smaps.clone()),
        }
    }

    /// The text of `numa_maps` (numa(7)) if it tells of another policy than the default, be it that of the task. Walks page
    /// tables.
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn policies(&self) -> Result<Option<String>> {
        match self {
            Self::Shadow(shadow) => {
                let text = match std::fs::read(procfs::path(shadow.pid, "numa_maps")) {
                    Ok(text) => text,
                    // The kernel was built without NUMA.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => {
                        let what = "read the memory policies of a shadow";
                        return Err(system(shadow.pid, what, error));
                    }
                };
                let text = String::from_utf8_lossy(&text).into_owned();
                let policy = |line: &str| line.split(' ').nth(1) != Some("default");
                Ok(text.lines().any(policy).then_some(text))
            }
            Self::Stored(_) => Ok(None),
        }
    }

    /// VMAs and flags, for mapping again what was there.
    pub(super) fn mapped(&self) -> Result<Mapped> {
        let vmas = match self {
            Self::Shadow(shadow) => {
                let text = std::fs::read(procfs::path(shadow.pid, "maps"))
                    .map_err(|error| system(shadow.pid, "read the map of a shadow", error))?;
                maps::parse(&text).unwrap_or_default()
            }
            Self::Stored(_) => Vec::new(),
        };
        let flags = smaps::parse(&self.smaps()?);
        Ok(Mapped { vmas, flags })
    }

    /// The guards (`MADV_GUARD_INSTALL`, Linux 6.13) of an address space of this layout.
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn guards(&self, layout: &Layout) -> Result<Ranges> {
        match self {
            Self::Shadow(shadow) => {
                let mut found = Vec::new();
                layout
                    .scan(&shadow.pagemap, Scan::Guards, Span::ALL, &mut found)
                    .map_err(|errno| system(shadow.pid, "scan a shadow for guards", errno))?;
                Ok(found.iter().map(Span::from).collect())
            }
            Self::Stored(stored) => Ok(stored.guards.clone()),
        }
    }

    /// Where the parts of the program are (fields of `/proc/PID/stat`).
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn bounds(&self) -> Result<Bounds> {
        match self {
            Self::Shadow(shadow) => procfs::Stat::read(shadow.pid)
                .map(|stat| stat.bounds())
                .map_err(|error| system(shadow.pid, "read the stat of a shadow", error)),
            Self::Stored(stored) => Ok(stored.bounds),
        }
    }

    /// The auxiliary vector (getauxval(3)).
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn auxv(&self) -> Result<Vec<u8>> {
        match self {
            Self::Shadow(shadow) => std::fs::read(procfs::path(shadow.pid, "auxv"))
                .map_err(|error| system(shadow.pid, "read the auxv of a shadow", error)),
            Self::Stored(stored) => Ok(stored.auxv.clone()),
        }
    }

    /// The program's file, open for reading.
    ///
    /// # Errors
    ///
    /// The shadow has died, or we may open no more files.
    pub fn program(&self) -> Result<File> {
        match self {
            Self::Shadow(shadow) => File::open(procfs::path(shadow.pid, "exe"))
                .map_err(|error| system(shadow.pid, "open the program of a shadow", error)),
            Self::Stored(stored) => reopened(&stored.program, false)
                .map_err(|error| system(nix::unistd::getpid(), "open a recorded program", error)),
        }
    }

    /// Device and inode of the program's file, if that can be had.
    pub(super) fn program_inode(&self) -> Option<(u64, u64)> {
        let metadata = match self {
            Self::Shadow(shadow) => std::fs::metadata(procfs::path(shadow.pid, "exe")),
            Self::Stored(stored) => stored.program.metadata(),
        };
        metadata
            .ok()
            .map(|metadata| (metadata.dev(), metadata.ino()))
    }
}

impl Stored {
    /// Opens the file behind a recorded VMA, if it is known; to write, if that can be.
    pub(super) fn open_mapped(&self, vma: &Vma) -> Option<std::io::Result<File>> {
        let file = self.files.get(&(vma.device, vma.inode))?;
        Some(reopened(file, vma.shared).or_else(|_| reopened(file, false)))
    }
}

/// A description of its own of a file that is open.
fn reopened(file: &File, write: bool) -> std::io::Result<File> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new()
        .read(true)
        .write(write)
        .open(Path::new(&path))
}
