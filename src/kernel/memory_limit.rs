//! How much memory a process's cgroup has room for: the memory controller (cgroups(7)), of either version.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use super::cgroup_path;

/// Room for more memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Bytes, with what the kernel can take from the page cache.
    pub bytes: u64,
    /// The file that says so.
    pub limit: PathBuf,
}

/// The room in the cgroup of a process, and in all above it; `None` if there is no limit that we can see.
///
/// # Errors
///
/// Those of reading `/proc`.
pub fn room(pid: Pid) -> io::Result<Option<Room>> {
    let rooms = cgroup_path::directories(pid, "memory")?;
    let rooms = rooms.iter().filter_map(|directory| room_in(directory));
    Ok(rooms.min_by_key(|room| room.bytes))
}

/// Bytes that the machine has for new programs without swapping (`MemAvailable`, proc_meminfo(5)).
///
/// # Errors
///
/// Those of reading `/proc`.
pub fn available() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok());
    let kibibytes: Option<u64> = kibibytes;
    let bytes = kibibytes.map(|kibibytes| kibibytes << 10);
    bytes.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn room_in(directory: &Path) -> Option<Room> {
    /// Version 1 has no word for none, but a number that no machine has.
    const NONE: u64 = 1 << 60;
    let number = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(directory.join(name)).ok()?;
        // `max` is no number.
        text.trim().parse().ok()
    };
    let (name, most, used, prefix) = match number("memory.max") {
        Some(most) => ("memory.max", most, number("memory.current")?, ""),
        None => {
            let most = number("memory.limit_in_bytes").filter(|most| *most < NONE)?;
            let used = number("memory.usage_in_bytes")?;
            ("memory.limit_in_bytes", most, used, "total_")
        }
    };
    let stat = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
    let cached = ["inactive_file", "active_file"].map(|key| {
        let line = |line: &str| {
            let (name, value) = line.split_once(' ')?;
            (name.strip_prefix(prefix) == Some(key)).then(|| value.parse().ok())?
        };
        stat.lines().find_map(line).unwrap_or(0u64)
    });
    let used = used.saturating_sub(cached.iter().sum());
    Some(Room {
        bytes: most.saturating_sub(used),
        limit: directory.join(name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_room_is_what_is_left_with_what_can_be_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        let bytes = || room_in(directory.path()).map(|room| room.bytes);
        assert_eq!(bytes(), None);
        write("memory.limit_in_bytes", "9223372036854771712\n");
        write("memory.usage_in_bytes", "900\n");
        assert_eq!(bytes(), None);
        write("memory.limit_in_bytes", "1000\n");
        write(
            "memory.stat",
            "inactive_file 1\ntotal_inactive_file 30\ntotal_active_file 20\n",
        );
        assert_eq!(bytes(), Some(150));
        write("memory.max", "max\n");
        assert_eq!(bytes(), Some(150));
        write("memory.current", "70\n");
        write("memory.max", "100\n");
        write("memory.stat", "anon 5\ninactive_file 10\nactive_file 5\n");
        assert_eq!(bytes(), Some(45));
        write("memory.max", "5\n");
        assert_eq!(bytes(), Some(0));
    }
}
