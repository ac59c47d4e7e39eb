//! Anonymous memory files (`memfd_create(2)`), mapped.
//!
//! A leaf: it imports nothing of the crate, so that [`crate::record`], which lies below the rest of this room, may
//! build its buffer chain on it.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};

/// Maps `len` bytes of a new memory file, zero-filled, shared and writable.
///
/// The file is sealed against every change of its size and its only descriptor is closed before this returns: the
/// mapping is all that is left of it, and dropping the mapping frees it. No page is allocated before it is touched, so
/// `len` costs address space only. `name` is what `/proc/PID/maps` shows after `/memfd:`.
///
/// # Errors
///
/// What `memfd_create(2)`, `ftruncate(2)`, `fcntl(2)` with `F_ADD_SEALS` and `mmap(2)` report.
pub fn map_memory_file(name: &CStr, len: usize) -> io::Result<MmapMut> {
    let flags = MemFdCreateFlag::MFD_CLOEXEC | MemFdCreateFlag::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags)?);
    file.set_len(len as u64)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_raw_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    // SAFETY: the file was made here and its descriptor is dropped below without having been shared, so nobody else
    // can write to it; it is sealed, so it cannot shrink under the mapping (no SIGBUS).
    let map = unsafe { MmapOptions::new().len(len).map_mut(&file)? };
    Ok(map)
}

/// A new memory file that holds `bytes`.
///
/// # Errors
///
/// What `memfd_create(2)` and `write(2)` report.
pub fn memory_file(name: &CStr, bytes: &[u8]) -> io::Result<File> {
    let file = File::from(memfd_create(name, MemFdCreateFlag::MFD_CLOEXEC)?);
    file.write_all_at(bytes, 0)?;
    Ok(file)
}

/// A memory file that one thread fills from the front while others read what is already there.
#[derive(Debug)]
struct Growing {
    map: MmapRaw,
    /// Bytes below are never written again.
    published: AtomicUsize,
}

/// The only writer of a memory file made by [`appendable_memory_file`].
#[derive(Debug)]
pub struct Appender(Arc<Growing>);

/// A reader of a memory file made by [`appendable_memory_file`].
#[derive(Debug, Clone)]
pub struct Appended(Arc<Growing>);

/// As [`map_memory_file`], to be filled by one thread while others read.
///
/// # Errors
///
/// As [`map_memory_file`].
pub fn appendable_memory_file(name: &CStr, len: usize) -> io::Result<(Appender, Appended)> {
    let map = MmapRaw::from(map_memory_file(name, len)?);
    let growing = Arc::new(Growing {
        map,
        published: AtomicUsize::new(0),
    });
    Ok((Appender(Arc::clone(&growing)), Appended(growing)))
}

impl Appender {
    /// Everything that is not published yet. Zero where it was not written to.
    pub fn room(&mut self) -> &mut [u8] {
        let growing = &*self.0;
        let published = growing.published.load(Ordering::Relaxed);
        // SAFETY: `published <= len`, so the range lies in the mapping, which lives as long as the borrow of `self`.
        // Readers only look below `published`, and this is the only `Appender` (it is not `Clone`), borrowed mutably:
        // nobody else refers to the range.
        unsafe {
            slice::from_raw_parts_mut(
                growing.map.as_mut_ptr().add(published),
                growing.map.len() - published,
            )
        }
    }

    /// How much is published.
    #[must_use]
    pub fn published(&self) -> usize {
        self.0.published.load(Ordering::Relaxed)
    }

    /// Shows the first `len` bytes of [`Appender::room`] to the readers, for good.
    ///
    /// # Panics
    ///
    /// If there is not that much room.
    pub fn publish(&mut self, len: usize) {
        let published = self.0.published.load(Ordering::Relaxed);
        assert!(
            len <= self.0.map.len() - published,
            "published more than there is"
        );
        self.0.published.store(published + len, Ordering::Release);
    }
}

impl Appended {
    /// What is published so far.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        let published = self.0.published.load(Ordering::Acquire);
        // SAFETY: the range lies in the mapping, which lives as long as the borrow of `self`. Bytes below `published`
        // are written before the store that is acquired here and never again.
        unsafe { slice::from_raw_parts(self.0.map.as_ptr(), published) }
    }

    /// Length of the file, published or not.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.0.map.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_see_what_is_published() {
        let (mut writer, reader) = appendable_memory_file(c"snapback-test", 4096).unwrap();
        writer.room()[..3].copy_from_slice(b"abc");
        assert_eq!(reader.bytes(), b"");
        writer.publish(2);
        let early = reader.bytes();
        assert_eq!(early, b"ab");
        assert_eq!(writer.room()[0], b'c');
        std::thread::scope(|scope| {
            scope.spawn(|| writer.publish(1));
            while reader.bytes().len() < 3 {
                std::thread::yield_now();
            }
        });
        assert_eq!((early, reader.bytes()), (&b"ab"[..], &b"abc"[..]));
    }

    #[test]
    #[should_panic(expected = "published more than there is")]
    fn no_more_can_be_published_than_there_is() {
        let (mut writer, _reader) = appendable_memory_file(c"snapback-test", 4096).unwrap();
        writer.publish(4097);
    }

    #[test]
    fn a_mapping_is_zero_and_writable() {
        let mut map = map_memory_file(c"snapback-test", 8192).unwrap();
        assert!(map.iter().all(|&byte| byte == 0));
        map[8191] = 7;
        assert_eq!(map[8191], 7);
    }

    #[test]
    fn an_impossible_length_is_an_error() {
        assert!(map_memory_file(c"snapback-test", usize::MAX / 2).is_err());
    }

    #[test]
    fn a_huge_length_costs_no_memory() {
        let map = map_memory_file(c"snapback-test", 1 << 36).unwrap();
        assert_eq!(map.len(), 1 << 36);
    }
}
