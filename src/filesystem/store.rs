//! Keeps contents of files, each once.
//!
//! They lie one after the other in a file without a name, so that nothing is left if the keeper is killed: on the file system
//! they come from, if that can share blocks, else in the store's directory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use std::os::fd::AsRawFd;

use crate::kernel::reflink;
use crate::outcome::Refusal;

use super::{Error, Result};

/// Contents begin at multiples of it.
const ALIGNMENT: u64 = 4096;
/// Bytes read and written at once.
pub const PIECE: usize = 1 << 20;
/// A file that has grown so long is not added to: offsets are not used again.
const LONGEST: u64 = 1 << 40;

/// A part of a file that is not a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins in the file that was kept.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Where it begins in the store.
    at: u64,
}

impl Segment {
    /// A part of a file that is read where it is.
    pub fn in_place(offset: u64, length: u64) -> Self {
        Self {
            offset,
            length,
            at: offset,
        }
    }
}

/// The content of a file at some time. Dropped, its space is free.
#[derive(Debug)]
pub struct Kept {
    /// Size of the file in bytes.
    pub size: u64,
    /// What of it is not a hole, in order.
    pub segments: Vec<Segment>,
    file: Arc<File>,
    used: Arc<AtomicU64>,
    /// Whether the blocks are shared with the file that it was taken from.
    shared: bool,
}

impl Kept {
    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.length).sum()
    }

    /// Whether its blocks are the file's own.
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Reads from a segment, at an offset in the file that was kept.
    pub fn read_exact_at(
        &self,
        segment: &Segment,
        buffer: &mut [u8],
        offset: u64,
    ) -> io::Result<()> {
        self.file
            .read_exact_at(buffer, segment.at + (offset - segment.offset))
    }

    /// Has a file share the blocks of a segment, as far as they are whole; returns how many bytes.
    pub fn share_into(&self, segment: &Segment, target: &File) -> u64 {
        let whole = segment.length / ALIGNMENT * ALIGNMENT;
        if !self.shared || whole == 0 || !segment.offset.is_multiple_of(ALIGNMENT) {
            return 0;
        }
        let done = reflink::share(
            self.file.as_fd(),
            segment.at,
            whole,
            target.as_fd(),
            segment.offset,
        );
        done.map_or(0, |()| whole)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes(), Ordering::Relaxed);
        for segment in &self.segments {
            free(&self.file, segment.at, segment.length);
        }
    }
}

fn free(file: &File, at: u64, length: u64) {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let end = (at + length).next_multiple_of(ALIGNMENT);
    if let Err(errno) = fallocate(file.as_raw_fd(), flags, at as i64, (end - at) as i64) {
        tracing::debug!(%errno, "space of the store is free when all of it is");
    }
}

/// Where contents are kept that come from one file system.
#[derive(Debug)]
struct Bin {
    /// Device of the file system.
    device: u64,
    file: Arc<File>,
    end: u64,
    /// Whether sharing of blocks works.
    shares: bool,
}

/// A file whose content is to be kept.
#[derive(Debug, Clone, Copy)]
pub struct From<'a> {
    /// Through the mount.
    pub live: &'a File,
    /// As it is in the upper layer of an overlay.
    pub own: Option<&'a File>,
}

/// Puts a part of a content (offset and length) into a bin; returns whether its blocks can be shared.
type Fill<'a> = dyn FnMut(&mut Bin, (u64, u64), u64, &mut Vec<u8>) -> io::Result<bool> + 'a;

/// The contents of all checkpoints of a keeper.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    max_bytes: Option<u64>,
    /// Something was refused for that.
    lacked_room: bool,
    used: Arc<AtomicU64>,
    bins: Vec<Bin>,
    buffer: Vec<u8>,
}

impl Store {
    /// Sets the most bytes that may be kept from now on; what there is stays.
    pub fn limit(&mut self, max_bytes: Option<u64>) {
        self.max_bytes = max_bytes;
    }

    /// Whether something was refused because no more may be kept, since this was asked last.
    pub fn take_lack(&mut self) -> bool {
        std::mem::take(&mut self.lacked_room)
    }

    /// An empty one. Nothing is made in `directory` before it is needed.
    pub fn new(directory: PathBuf, max_bytes: Option<u64>) -> Self {
        Self {
            directory,
            max_bytes,
            lacked_room: false,
            used: Arc::default(),
            bins: Vec::new(),
            buffer: Vec::new(),
        }
    }

    /// Bytes it holds.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Keeps the content of a file. `beside` is a directory of its file system, `device` names that.
    ///
    /// # Errors
    ///
    /// Refused if there is no room.
    pub fn keep(
        &mut self,
        from: From<'_>,
        size: u64,
        device: u64,
        beside: &Path,
    ) -> Result<Arc<Kept>> {
        let failed = |error| Error::File {
            what: "keep the content of",
            path: PathBuf::from(format!("inode of {}", beside.display())),
            error,
        };
        let data = data_of(from.live, size).map_err(failed)?;
        self.keep_parts(
            size,
            data,
            (device, beside),
            &mut |bin, part, at, buffer| fill(bin, from, part, at, buffer),
        )
    }

    /// Keeps a content of which `data`, offsets and lengths, is no hole, as `read` gives it at an offset.
    ///
    /// # Errors
    ///
    /// Refused if there is no room.
    pub fn keep_read(
        &mut self,
        size: u64,
        data: Vec<(u64, u64)>,
        beside: (u64, &Path),
        read: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<Arc<Kept>> {
        self.keep_parts(
            size,
            data,
            beside,
            &mut |bin, (offset, length), at, buffer| {
                buffer.resize(PIECE, 0);
                let mut done = 0;
                while done < length {
                    let piece = &mut buffer[..(length - done).min(PIECE as u64) as usize];
                    read(offset + done, piece)?;
                    bin.file.write_all_at(piece, at + done)?;
                    done += piece.len() as u64;
                }
                // The blocks are not a file's yet, and can be from now on.
                Ok(bin.shares)
            },
        )
    }

    fn keep_parts(
        &mut self,
        size: u64,
        data: Vec<(u64, u64)>,
        (device, beside): (u64, &Path),
        fill: &mut Fill<'_>,
    ) -> Result<Arc<Kept>> {
        let failed = |error| Error::File {
            what: "keep the content of",
            path: PathBuf::from(format!("inode of {}", beside.display())),
            error,
        };
        let bytes: u64 = data.iter().map(|(_, length)| length).sum();
        if let Some(most) = self.max_bytes {
            let needed = self.used() + bytes;
            if needed > most {
                self.lacked_room = true;
                return Err(Error::Refused(Refusal {
                    object: format!("{needed} bytes of files"),
                    holder: "the checkpoint".into(),
                    remedy: format!(
                        "no more than {most} may be kept (--max-bytes); release other checkpoints or allow more"
                    ),
                }));
            }
        }
        let index = self.bin(device, beside)?;
        let bin = &mut self.bins[index];
        let mut kept = Kept {
            size,
            segments: Vec::with_capacity(data.len()),
            file: Arc::clone(&bin.file),
            used: Arc::clone(&self.used),
            shared: bin.shares,
        };
        for (offset, length) in data {
            let at = bin.end;
            bin.end = (at + length).next_multiple_of(ALIGNMENT);
            kept.segments.push(Segment { offset, length, at });
            self.used.fetch_add(length, Ordering::Relaxed);
            let filled = fill(bin, (offset, length), at, &mut self.buffer);
            match filled {
                Ok(shared) => kept.shared &= shared,
                Err(error) => return Err(no_room(error, &self.directory).unwrap_or_else(failed)),
            }
        }
        Ok(Arc::new(kept))
    }

    /// The bin for files of a file system.
    fn bin(&mut self, device: u64, beside: &Path) -> Result<usize> {
        let usable = |bin: &Bin| bin.device == device && bin.end < LONGEST;
        if let Some(index) = self.bins.iter().position(usable) {
            return Ok(index);
        }
        let (file, shares) = match unnamed(beside).ok().filter(can_share) {
            Some(file) => (file, true),
            None => {
                let made = std::fs::create_dir_all(&self.directory)
                    .and_then(|()| unnamed(&self.directory));
                let file = made.map_err(|error| Error::File {
                    what: "make a file in",
                    path: self.directory.clone(),
                    error,
                })?;
                (file, false)
            }
        };
        self.bins.retain(|bin| bin.device != device);
        self.bins.push(Bin {
            device,
            file: Arc::new(file),
            end: 0,
            shares,
        });
        Ok(self.bins.len() - 1)
    }
}

/// A file without a name (open(2), `O_TMPFILE`).
fn unnamed(directory: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC)
        .open(directory)
}

/// Whether a file's file system can share blocks: tried within it.
fn can_share(file: &File) -> bool {
    let tried = file.write_all_at(&[1], 0).is_ok()
        && reflink::share(file.as_fd(), 0, 0, file.as_fd(), ALIGNMENT).is_ok();
    let cleared = file.set_len(0).is_ok();
    tried && cleared
}

/// Puts a part of a file into the bin; returns whether its blocks are shared.
fn fill(
    bin: &mut Bin,
    from: From<'_>,
    (offset, length): (u64, u64),
    at: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<bool> {
    if bin.shares && offset.is_multiple_of(ALIGNMENT) {
        let file = from.own.unwrap_or(from.live);
        match reflink::share(file.as_fd(), offset, length, bin.file.as_fd(), at) {
            Ok(()) => return Ok(true),
            Err(Errno::ENOSPC | Errno::EDQUOT) => {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            Err(errno) => tracing::debug!(%errno, "copied, not shared"),
        }
    }
    buffer.resize(PIECE, 0);
    let mut done = 0;
    while done < length {
        let piece = &mut buffer[..(length - done).min(PIECE as u64) as usize];
        from.live.read_exact_at(piece, offset + done)?;
        bin.file.write_all_at(piece, at + done)?;
        done += piece.len() as u64;
    }
    Ok(false)
}

fn no_room(error: io::Error, directory: &Path) -> std::result::Result<Error, io::Error> {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Ok(Error::Refused(Refusal {
            object: "the content of its files".into(),
            holder: format!("the store in {}", directory.display()),
            remedy: format!(
                "there is no room for it ({error}); release other checkpoints or make room"
            ),
        })),
        _ => Err(error),
    }
}

/// Parts of a file that are not holes: offset and length.
pub fn data_of(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start.min(size),
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        if start >= size {
            break;
        }
        let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))?.min(size);
        found.push((start, end - start));
        at = end;
    }
    Ok(found)
}
