//! Where a file has data, and where holes (lseek(2), `SEEK_DATA`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

/// The parts of a file of `size` bytes that are not holes, start and end, in order; whole pages but for the end.
///
/// # Errors
///
/// What lseek(2) reports.
pub fn data_of(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match lseek64(file.as_raw_fd(), at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek64(file.as_raw_fd(), start as i64, Whence::SeekHole)? as u64;
        if start < size {
            found.push((start, end.min(size)));
        }
        at = end;
    }
    Ok(found)
}
