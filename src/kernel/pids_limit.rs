//! How many tasks a process's cgroup has room for: the pids controller (cgroups(7)), of either version.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use super::cgroup_path;

/// Room for more tasks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// How many.
    pub tasks: u64,
    /// The file that says so.
    pub limit: PathBuf,
}

/// The room in the cgroup of a process, and in all above it; `None` if there is no limit that we can see.
///
/// # Errors
///
/// Those of reading `/proc`.
pub fn room(pid: Pid) -> io::Result<Option<Room>> {
    let rooms = cgroup_path::directories(pid, "pids")?;
    let rooms = rooms.iter().filter_map(|directory| room_in(directory));
    Ok(rooms.min_by_key(|room| room.tasks))
}

fn room_in(directory: &Path) -> Option<Room> {
    let limit = directory.join("pids.max");
    let number = |path: &Path| -> Option<u64> {
        let text = fs::read_to_string(path).ok()?;
        text.trim().parse().ok()
    };
    // `max` is no number.
    let most = number(&limit)?;
    let tasks = most.saturating_sub(number(&directory.join("pids.current"))?);
    Some(Room { tasks, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_room_is_what_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        assert_eq!(room_in(directory.path()), None);
        write("pids.current", "7\n");
        write("pids.max", "max\n");
        assert_eq!(room_in(directory.path()), None);
        write("pids.max", "10\n");
        assert_eq!(room_in(directory.path()).unwrap().tasks, 3);
        write("pids.max", "5\n");
        assert_eq!(room_in(directory.path()).unwrap().tasks, 0);
    }
}
