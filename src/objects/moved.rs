//! Files that had been deleted and were made again.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;

use super::Error;
use super::capture::Capture;
use super::state::State;

/// Notes that a file was made again: its device, the number its inode had and the one it has, and a path that leads to it.
/// Descriptions of it count as closed from now on, whatever is still open on the old inode, and are opened again.
pub fn moved(
    capture: &mut Capture,
    (device, was, is): (u64, u64, u64),
    path: &Path,
) -> Result<(), Error> {
    let recorded = &mut capture.recorded;
    for (id, description) in &mut recorded.descriptions {
        let State::File(_) = &description.state else {
            continue;
        };
        if description.common.inode() != (device, was) {
            continue;
        }
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(path);
        let failed = |call| {
            move |error: std::io::Error| Error::Own {
                call,
                errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
            }
        };
        let file = file.map_err(failed("open of a file that was made again"))?;
        let found = file
            .metadata()
            .map_err(failed("stat of a file that was made again"))?;
        if (found.dev(), found.ino()) != (device, is) {
            return Err(Error::Own {
                call: "open of a file that was made again",
                errno: Errno::ESTALE,
            });
        }
        description.common.ino = is;
        capture.pins.insert(*id, OwnedFd::from(file));
    }
    for lock in &mut recorded.locks {
        if lock.inode == (device, was) {
            lock.inode = (device, is);
        }
    }
    Ok(())
}
