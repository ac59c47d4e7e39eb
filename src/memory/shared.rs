//! Shared memory: saved by content, once per object, whoever maps it.
//!
//! Shadows share it with the program, and a child forked later writes to it untracked; so it is kept as a copy, and a
//! rollback compares all of it: in place, if nobody outside of the tree can have a name for it.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::MmapMut;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::kernel::memory_file::map_memory_file;
use crate::kernel::procfs;
use crate::kernel::shared_map::SharedMap;
use crate::kernel::sparse;
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
    /// As long as the object was, and what of it is not zero.
    size: u64,
    data: Ranges,
    copy: Option<Arc<MmapMut>>,
    /// The object's content in place. Not for a file with a name: whoever opens it can cut it off while it is looked at.
    in_place: OnceCell<Option<SharedMap>>,
}

/// The content of an object of shared memory.
#[derive(Debug)]
pub struct SharedContent {
    /// The object id of its record.
    pub id: ObjectId,
    /// Its length in bytes.
    pub size: u64,
    /// What of it is not a hole.
    pub data: Ranges,
    copy: Option<Arc<MmapMut>>,
}

impl SharedContent {
    /// Its bytes; those of holes are zero, and looking at them costs memory.
    pub fn bytes(&self) -> &[u8] {
        self.copy.as_ref().map_or(&[], |copy| copy)
    }
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
        let size = metadata.len();
        let data = data_of(&live, size).map_err(failed("look for the data of"))?;
        // A mapping can't be empty.
        let mut copy = match size {
            0 => None,
            _ => Some(
                map_memory_file(c"snapback-shared", size as usize)
                    .map_err(failed("make room for"))?,
            ),
        };
        if let Some(copy) = &mut copy {
            for span in data.spans() {
                live.read_exact_at(&mut copy[bytes_of(*span)], span.start)
                    .map_err(failed("save"))?;
            }
        }
        let record = SharedObject {
            device: metadata.dev(),
            inode: metadata.ino(),
            size,
            data: data.bytes(),
        };
        context.put(Kind::SharedMemory, id, &record, name.as_bytes())?;
        Ok(Some(Self {
            id,
            holder: pid,
            name,
            pin,
            size,
            data,
            copy: copy.map(Arc::new),
            in_place: OnceCell::new(),
        }))
    }

    /// Makes the live object's content what it was. Only pages that differ are written.
    pub fn restore(&self) -> Result<Copied> {
        let mut copied = Copied::default();
        let live = self.open(true)?;
        if live.metadata().map_err(self.failed("stat"))?.len() != self.size {
            live.set_len(self.size).map_err(self.failed("size"))?;
        }
        for span in self.differences(&live)? {
            let bytes = self.saved(span);
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

    /// Names a difference between the live content and the saved one, if there is one. Everything is read.
    pub fn verify(&self) -> Result<Option<Difference>> {
        let live = self.open(false)?;
        let found = live.metadata().map_err(self.failed("stat"))?.len();
        if found != self.size {
            return Ok(Some(Difference {
                what: format!("shared memory {}: size", self.name),
                expected: self.size.to_string(),
                found: found.to_string(),
            }));
        }
        let mut buffer = vec![0; PIECE as usize];
        let everything = Ranges::from_iter([Span {
            start: 0,
            end: self.size,
        }]);
        for span in everything.pieces(PIECE) {
            let found = &mut buffer[..span.len() as usize];
            live.read_exact_at(found, span.start)
                .map_err(self.failed("read"))?;
            let saved = self.saved(span);
            if found != saved
                && let Some(at) = (0..found.len()).find(|at| found[*at] != saved[*at])
            {
                return Ok(Some(Difference {
                    what: format!(
                        "shared memory {}: byte {:#x}",
                        self.name,
                        span.start + at as u64
                    ),
                    expected: format!("{:#04x}", saved[at]),
                    found: format!("{:#04x}", found[at]),
                }));
            }
        }
        Ok(None)
    }

    /// Its content, to be read on another thread and after this is dropped.
    pub fn content(&self) -> SharedContent {
        SharedContent {
            id: self.id,
            size: self.size,
            data: self.data.clone(),
            copy: self.copy.clone(),
        }
    }

    /// Bytes kept for it.
    pub fn bytes(&self) -> u64 {
        self.data.bytes()
    }

    /// What stood there. Looking at a hole of the copy makes a page of it, so where there was no data there are other
    /// zeroes.
    fn saved(&self, span: Span) -> &[u8] {
        static NOTHING: [u8; PIECE as usize] = [0; PIECE as usize];
        match &self.copy {
            Some(copy) if self.data.touches(span) => &copy[bytes_of(span)],
            _ => &NOTHING[..span.len() as usize],
        }
    }

    fn open(&self, write: bool) -> Result<File> {
        OpenOptions::new()
            .read(true)
            .write(write)
            .open(reopen(&self.pin))
            .map_err(self.failed("open"))
    }

    /// The pages that differ.
    fn differences(&self, live: &File) -> Result<Vec<Span>> {
        let failed = self.failed("look for the data of");
        let live_data = data_of(live, self.size).map_err(failed)?;
        let new = live_data.difference(&self.data);
        let in_place = self.map_in_place()?;
        let mut buffer = vec![0; PIECE as usize];
        let mut found = Vec::new();
        for span in self.data.pieces(PIECE).chain(new.pieces(PIECE)) {
            let there = match in_place {
                Some(map) => There::InPlace(map),
                None => {
                    let bytes = &mut buffer[..span.len() as usize];
                    live.read_exact_at(bytes, span.start)
                        .map_err(self.failed("read"))?;
                    There::Read(bytes, span.start)
                }
            };
            if there.is(span, self.saved(span)) {
                continue;
            }
            let pages = Ranges::from_iter([span]);
            let differing = pages
                .pieces(PAGE)
                .filter(|page| !there.is(*page, self.saved(*page)));
            found.extend(differing);
        }
        Ok(found)
    }

    /// Its content in place, if that can't be cut off meanwhile.
    fn map_in_place(&self) -> Result<Option<&SharedMap>> {
        if let Some(map) = self.in_place.get() {
            return Ok(map.as_ref());
        }
        let has_name = self.pin.metadata().map_err(self.failed("stat"))?.nlink() > 0;
        let map = match has_name || self.size == 0 {
            true => None,
            false => {
                // Opened for reading only: one that could be written to would keep the program from sealing it.
                let map = SharedMap::of(&self.open(false)?, self.size as usize);
                Some(map.map_err(self.failed("map"))?)
            }
        };
        Ok(self.in_place.get_or_init(|| map).as_ref())
    }

    fn failed(&self, what: &str) -> impl Fn(std::io::Error) -> super::Error + use<> {
        let what = format!("{what} the shared memory {}", self.name);
        let holder = self.holder;
        move |error| system(holder, &what, error)
    }
}

/// A piece of the live content.
enum There<'a> {
    /// All of it, mapped.
    InPlace(&'a SharedMap),
    /// The piece itself, and where it begins.
    Read(&'a [u8], u64),
}

impl There<'_> {
    /// Whether a part of it is as given.
    fn is(&self, span: Span, bytes: &[u8]) -> bool {
        match self {
            Self::InPlace(map) => map.holds(span.start as usize, bytes),
            Self::Read(read, start) => {
                let at = (span.start - start) as usize;
                read[at..at + bytes.len()] == *bytes
            }
        }
    }
}

fn bytes_of(span: Span) -> std::ops::Range<usize> {
    span.start as usize..span.end as usize
}

fn reopen(pin: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", pin.as_fd().as_raw_fd()))
}

/// The spans of a file of `size` bytes that are not holes, in whole pages but for the end.
fn data_of(file: &File, size: u64) -> std::io::Result<Ranges> {
    let parts = sparse::data_of(file, size)?.into_iter();
    Ok(parts.map(|(start, end)| Span { start, end }).collect())
}
