//! Comparing a file's content with bytes of ours without copying it: a mapping that is never borrowed; and the file behind a
//! shared mapping that has none.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{MmapOptions, MmapRaw};

/// A read-only shared mapping of a file that others may write to.
#[derive(Debug)]
pub struct SharedMap(MmapRaw);

impl SharedMap {
    /// Maps the first `len` bytes of a file.
    ///
    /// # Errors
    ///
    /// What mmap(2) reports; it refuses an empty mapping.
    pub fn of(file: &File, len: usize) -> io::Result<Self> {
        MmapOptions::new()
            .len(len)
            .map_raw_read_only(file)
            .map(Self)
    }

    /// Whether these bytes stand at `offset`. The file must be as long as that: the kernel answers a look behind its end
    /// with `SIGBUS` (mmap(2)).
    ///
    /// # Panics
    ///
    /// If it was not mapped so far.
    pub fn holds(&self, offset: usize, bytes: &[u8]) -> bool {
        let end = offset.checked_add(bytes.len());
        assert!(
            end.is_some_and(|end| end <= self.0.len()),
            "outside the mapping"
        );
        // SAFETY: both ranges are mapped, as just asserted; memcmp(3) only reads, and no reference is made to memory that
        // others may write to.
        unsafe {
            let there = self.0.as_ptr().add(offset);
            libc::memcmp(there.cast(), bytes.as_ptr().cast(), bytes.len()) == 0
        }
    }
}

/// The file behind shared anonymous memory of `len` bytes, as `mmap(MAP_SHARED | MAP_ANONYMOUS)` makes it: open, and nowhere
/// mapped.
///
/// # Errors
///
/// What mmap(2) or open(2) of `/proc/self/map_files` reports.
pub fn anonymous(len: usize) -> io::Result<File> {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    let length = std::num::NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: at an address of the kernel's choice, so over nothing that is there.
    let start = unsafe { mmap_anonymous(None, length, prot, MapFlags::MAP_SHARED)? };
    let address = start.as_ptr() as usize;
    let path = format!("/proc/self/map_files/{address:x}-{:x}", address + len);
    let file = File::options().read(true).write(true).open(path);
    // SAFETY: just mapped here, and never borrowed.
    unsafe { munmap(start, len)? };
    file
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn anonymous_memory_has_a_file() {
        let file = anonymous(8192).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"abc", 5000).unwrap();
        let map = SharedMap::of(&file, 8192).unwrap();
        assert!(map.holds(5000, b"abc") && map.holds(0, &[0; 4096]));
    }

    #[test]
    fn what_is_written_later_is_seen() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abcd").unwrap();
        let map = SharedMap::of(&file, 4).unwrap();
        assert!(map.holds(1, b"bcd"));
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 2).unwrap();
        assert!(!map.holds(1, b"bcd"));
        assert!(map.holds(0, b"ab") && map.holds(4, b""));
    }

    #[test]
    #[should_panic(expected = "outside the mapping")]
    fn it_ends_where_it_was_mapped_to() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8).unwrap();
        SharedMap::of(&file, 4).unwrap().holds(2, b"abc");
    }
}
