//! Shared memory: saved by content, once per object, whoever maps it.
//!
//! Shadows share it with the program, and a child forked later writes to it untracked; so it is kept as a copy, and a
//! rollback compares all of it.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::{Pid, Whence, lseek64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::kernel::procfs;
use crate::outcome::Difference;
use crate::record::{Context, Interned, Kind, ObjectId, ObjectKey};

use super::PAGE;
use super::Result;
use super::image::SpaceImage;
use super::ranges::{Ranges, Span};
use super::space::{Copied, refuse, system};

/// Payload of a `SharedMemory` record; the content is kept beside the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct SharedObject {
    /// Device of the object's file.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of it that are not holes.
    pub data: u64,
}

/// One object of shared memory, and its content.
#[derive(Debug)]
pub struct SharedImage {
    /// The object id of its record.
    pub id: ObjectId,
    holder: Pid,
    name: String,
    /// An `O_PATH` descriptor: it keeps the object, not a way to read or write it.
    pin: File,
    copy: File,
}

/// Bytes read and compared at once.
const PIECE: u64 = 256 << 10;

impl SharedImage {
    /// Saves every object of shared memory that the spaces of `images` map, and the memfds given by PID and number.
    pub fn capture_all(
        images: &[SpaceImage],
        memfds: &[(Pid, RawFd)],
        context: &mut Context,
    ) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        let mut seen = BTreeSet::new();
        for image in images {
            for vma in image
                .layout
                .vmas
                .iter()
                .filter(|vma| vma.shared && !vma.is_special())
            {
                if vma.is_anonymous() || !seen.insert((vma.device, vma.inode)) {
                    continue;
                }
                let path = procfs::path(
                    image.pid,
                    &format!("map_files/{:x}-{:x}", vma.start, vma.end),
                );
                found.extend(Self::capture(
                    image.pid,
                    &path,
                    String::from_utf8_lossy(&vma.name).into(),
                    context,
                )?);
            }
        }
        for (pid, number) in memfds {
            let path = procfs::path(*pid, &format!("fd/{number}"));
            found.extend(Self::capture(
                *pid,
                &path,
                format!("memfd {number}"),
                context,
            )?);
        }
        Ok(found)
    }

    /// Saves the object that `path` leads to. `None`: it is a file on a disk, or is saved already.
    fn capture(pid: Pid, path: &Path, name: String, context: &mut Context) -> Result<Option<Self>> {
        let failed = |what: &str| {
            let what = format!("{what} the shared memory {name} at {}", path.display());
            move |error: std::io::Error| system(pid, &what, error)
        };
        let pin = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)
            .map_err(failed("pin"))?;
        let kind = fstatfs(&pin)
            .map_err(|errno| system(pid, "statfs of shared memory", errno))?
            .filesystem_type();
        if kind != TMPFS_MAGIC && kind != HUGETLBFS_MAGIC {
            return Ok(None);
        }
        if kind == HUGETLBFS_MAGIC {
            return Err(refuse(
                pid,
                format!("shared memory {name}"),
                "huge pages of hugetlbfs can't be taken yet",
            ));
        }
        let metadata = pin.metadata().map_err(failed("stat"))?;
        let key = ObjectKey::new(Kind::SharedMemory, metadata.dev(), metadata.ino());
        let Interned::New(id) = context.intern(key) else {
            return Ok(None);
        };
        let live = File::open(reopen(&pin)).map_err(failed("open"))?;
        let copy = memfd_create(c"snapback-shared", MemFdCreateFlag::MFD_CLOEXEC)
            .map(File::from)
            .map_err(|errno| system(pid, "make room for shared memory", errno))?;
        copy.set_len(metadata.len())
            .map_err(failed("make room for"))?;
        let data = data_of(&live, metadata.len()).map_err(failed("look for the data of"))?;
        let mut buffer = vec![0; PIECE as usize];
        for span in data.pieces(PIECE) {
            let bytes = &mut buffer[..span.len() as usize];
            live.read_exact_at(bytes, span.start)
                .map_err(failed("read"))?;
            copy.write_all_at(bytes, span.start)
                .map_err(failed("save"))?;
        }
        let record = SharedObject {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            data: data.bytes(),
        };
        context.put(Kind::SharedMemory, id, &record, name.as_bytes())?;
        Ok(Some(Self {
            id,
            holder: pid,
            name,
            pin,
            copy,
        }))
    }

    /// Makes the live object's content what it was. Only pages that differ are written.
    pub fn restore(&self) -> Result<Copied> {
        let mut copied = Copied::default();
        let live = self.open(true)?;
        let size = self
            .copy
            .metadata()
            .map_err(self.failed("stat the copy of"))?
            .len();
        if live.metadata().map_err(self.failed("stat"))?.len() != size {
            live.set_len(size).map_err(self.failed("size"))?;
        }
        for difference in self.differences(&live, size)? {
            let span = Span {
                start: difference,
                end: size.min(difference + PAGE),
            };
            let mut page = [0; PAGE as usize];
            let bytes = &mut page[..span.len() as usize];
            self.copy
                .read_exact_at(bytes, span.start)
                .map_err(self.failed("read the copy of"))?;
            if bytes.iter().all(|byte| *byte == 0) {
                let punch =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(
                    live.as_raw_fd(),
                    punch,
                    span.start as i64,
                    span.len() as i64,
                )
                .map_err(|errno| self.failed("empty")(errno.into()))?;
            } else {
                live.write_all_at(bytes, span.start)
                    .map_err(self.failed("write"))?;
            }
            copied.pages += 1;
            copied.bytes += span.len();
        }
        Ok(copied)
    }

    /// Names a difference between the live content and the saved one, if there is one.
    pub fn verify(&self) -> Result<Option<Difference>> {
        let live = self.open(false)?;
        let size = self
            .copy
            .metadata()
            .map_err(self.failed("stat the copy of"))?
            .len();
        let found = live.metadata().map_err(self.failed("stat"))?.len();
        if found != size {
            return Ok(Some(Difference {
                what: format!("shared memory {}: size", self.name),
                expected: size.to_string(),
                found: found.to_string(),
            }));
        }
        let (mut one, mut other) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
        let everything = Ranges::from_iter([Span {
            start: 0,
            end: size,
        }]);
        for span in everything.pieces(PIECE) {
            let len = span.len() as usize;
            live.read_exact_at(&mut one[..len], span.start)
                .map_err(self.failed("read"))?;
            self.copy
                .read_exact_at(&mut other[..len], span.start)
                .map_err(self.failed("read the copy of"))?;
            if one[..len] != other[..len]
                && let Some(at) = (0..len).find(|at| one[*at] != other[*at])
            {
                return Ok(Some(Difference {
                    what: format!(
                        "shared memory {}: byte {:#x}",
                        self.name,
                        span.start + at as u64
                    ),
                    expected: format!("{:#04x}", other[at]),
                    found: format!("{:#04x}", one[at]),
                }));
            }
        }
        Ok(None)
    }

    /// Bytes kept for it.
    pub fn bytes(&self) -> u64 {
        self.copy
            .metadata()
            .map_or(0, |metadata| metadata.blocks() * 512)
    }

    fn open(&self, write: bool) -> Result<File> {
        OpenOptions::new()
            .read(true)
            .write(write)
            .open(reopen(&self.pin))
            .map_err(self.failed("open"))
    }

    /// Offsets of the pages that differ.
    fn differences(&self, live: &File, size: u64) -> Result<Vec<u64>> {
        let data = data_of(live, size)
            .and_then(|live| Ok(live.union(&data_of(&self.copy, size)?)))
            .map_err(self.failed("look for the data of"))?;
        let (mut one, mut other) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
        let mut found = Vec::new();
        for span in data.pieces(PIECE) {
            let len = span.len() as usize;
            live.read_exact_at(&mut one[..len], span.start)
                .map_err(self.failed("read"))?;
            self.copy
                .read_exact_at(&mut other[..len], span.start)
                .map_err(self.failed("read the copy of"))?;
            if one[..len] == other[..len] {
                continue;
            }
            let pages = one[..len]
                .chunks(PAGE as usize)
                .zip(other[..len].chunks(PAGE as usize));
            let differing = pages.enumerate().filter(|(_, (one, other))| one != other);
            found.extend(differing.map(|(index, _)| span.start + index as u64 * PAGE));
        }
        Ok(found)
    }

    fn failed(&self, what: &str) -> impl Fn(std::io::Error) -> super::Error + use<> {
        let what = format!("{what} the shared memory {}", self.name);
        let holder = self.holder;
        move |error| system(holder, &what, error)
    }
}

fn reopen(pin: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", pin.as_fd().as_raw_fd()))
}

/// The spans of a file of `size` bytes that are not holes, in whole pages but for the end.
fn data_of(file: &File, size: u64) -> std::io::Result<Ranges> {
    let mut found = Ranges::new();
    let mut at = 0;
    while at < size {
        let start = match lseek64(file.as_raw_fd(), at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek64(file.as_raw_fd(), start as i64, Whence::SeekHole)? as u64;
        found.push(Span {
            start,
            end: end.min(size),
        });
        at = end;
    }
    Ok(found)
}
