//! How many tasks a process's cgroup has room for: the pids controller (cgroups(7)), of either version.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use super::{mountinfo, procfs};

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
    let text = fs::read_to_string(procfs::path(pid, "cgroup"))?;
    let mut least: Option<Room> = None;
    for mount in mountinfo::read_own()? {
        let line = match mount.file_system.as_str() {
            "cgroup" if mount.option("pids").next().is_some() => path_of(&text, "pids"),
            "cgroup2" => path_of(&text, ""),
            _ => continue,
        };
        let Some(Ok(below)) = line.map(|path| Path::new(path).strip_prefix(&mount.root)) else {
            continue;
        };
        let directory = mount.mount_point.join(below);
        let ancestors = directory.ancestors();
        for directory in ancestors.take_while(|directory| directory.starts_with(&mount.mount_point))
        {
            let room = room_in(directory);
            if let Some(room) = room
                && least.as_ref().is_none_or(|least| room.tasks < least.tasks)
            {
                least = Some(room);
            }
        }
    }
    Ok(least)
}

/// The path of a hierarchy, the one with this controller, in the text of `/proc/PID/cgroup`.
fn path_of<'t>(text: &'t str, controller: &str) -> Option<&'t str> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let mut controllers = fields.next()?.split(',');
        controllers
            .any(|name| name == controller)
            .then(|| fields.next())
            .flatten()
    })
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
    fn hierarchies_are_told_apart() {
        let text = "4:cpu,cpuacct:/a\n3:pids:/b:c\n0::/d\n";
        assert_eq!(path_of(text, "pids"), Some("/b:c"));
        assert_eq!(path_of(text, "cpuacct"), Some("/a"));
        assert_eq!(path_of(text, ""), Some("/d"));
        assert_eq!(path_of(text, "memory"), None);
    }

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
