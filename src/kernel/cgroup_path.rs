//! Where the cgroups of a process are (cgroups(7)), in hierarchies of either version.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use super::{mountinfo, procfs};

/// The directories of a process's cgroup with a controller, as `pids`, and of all above it, as far as we see them.
///
/// # Errors
///
/// Those of reading `/proc`.
pub fn directories(pid: Pid, controller: &str) -> io::Result<Vec<PathBuf>> {
    let text = fs::read_to_string(procfs::path(pid, "cgroup"))?;
    let mut found = Vec::new();
    for mount in mountinfo::read_own()? {
        let line = match mount.file_system.as_str() {
            "cgroup" if mount.option(controller).next().is_some() => path_of(&text, controller),
            "cgroup2" => path_of(&text, ""),
            _ => continue,
        };
        let Some(Ok(below)) = line.map(|path| Path::new(path).strip_prefix(&mount.root)) else {
            continue;
        };
        let directory = mount.mount_point.join(below);
        let ancestors = directory.ancestors();
        let inside = ancestors.take_while(|directory| directory.starts_with(&mount.mount_point));
        found.extend(inside.map(Path::to_owned));
    }
    Ok(found)
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
}
