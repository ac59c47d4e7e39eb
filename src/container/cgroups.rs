//! The cgroup of a container in every mounted hierarchy: cgroups(7).

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use super::Error;

/// A cgroup in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    /// The hierarchy's controllers as the mount names them (`memory`, `cpu,cpuacct`); empty for version 2.
    pub controllers: String,
    /// The cgroup's directory.
    pub directory: PathBuf,
}

/// The directories that the cgroup `path` has, over all hierarchies.
pub(super) fn directories(path: &Path) -> Result<Vec<Cgroup>, Error> {
    const MOUNTS: &str = "/proc/self/mountinfo";
    let relative = path.strip_prefix("/").unwrap_or(path);
    let mounts = fs::read_to_string(MOUNTS).map_err(Error::io("reading", MOUNTS))?;
    let candidates = mounts
        .lines()
        .filter_map(hierarchy)
        .map(|(controllers, mount_point)| Cgroup {
            controllers: controllers.to_owned(),
            directory: Path::new(mount_point).join(relative),
        });
    Ok(candidates
        .filter(|cgroup| cgroup.directory.is_dir())
        .collect())
}

/// The controllers and the mount point of a cgroup hierarchy from its line in `/proc/PID/mountinfo`.
fn hierarchy(line: &str) -> Option<(&str, &str)> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mount_point = mount.split(' ').nth(4)?;
    let mut filesystem = filesystem.split(' ');
    match filesystem.next()? {
        "cgroup2" => Some(("", mount_point)),
        "cgroup" => {
            // The controllers are among the options of the superblock, behind `rw` or `ro`.
            let options = filesystem.nth(1)?;
            Some((
                options
                    .split_once(',')
                    .map_or("", |(_, controllers)| controllers),
                mount_point,
            ))
        }
        _ => None,
    }
}

/// The processes in these cgroups and those below them.
pub(super) fn processes(cgroups: &[Cgroup]) -> Result<BTreeSet<Pid>, Error> {
    let mut found = BTreeSet::new();
    for cgroup in cgroups {
        collect(&cgroup.directory, &mut found)?;
    }
    Ok(found)
}

fn collect(directory: &Path, found: &mut BTreeSet<Pid>) -> Result<(), Error> {
    let path = directory.join("cgroup.procs");
    match fs::read_to_string(&path) {
        Ok(text) => found.extend(
            text.lines()
                .filter_map(|pid| pid.parse().ok())
                .map(Pid::from_raw),
        ),
        // Removed while we look, or a threaded cgroup, whose processes the parent lists.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => (),
        Err(error) => return Err(Error::io("reading", path)(error)),
    }
    for entry in fs::read_dir(directory).map_err(Error::io("reading", directory))? {
        let entry = entry.map_err(Error::io("reading", directory))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), found)?;
        }
    }
    Ok(())
}

/// Removes these cgroups, those below them first, as far as they are empty.
pub(super) fn remove(cgroups: &[Cgroup]) -> Result<(), Error> {
    cgroups
        .iter()
        .try_for_each(|cgroup| remove_tree(&cgroup.directory))
}

fn remove_tree(directory: &Path) -> Result<(), Error> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("reading", directory)(error)),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::io("removing the cgroup", directory)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_read_from_mountinfo() {
        let v1 = "25 24 0:22 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct";
        assert_eq!(
            hierarchy(v1),
            Some(("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct"))
        );
        let v2 = "26 24 0:23 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";
        assert_eq!(hierarchy(v2), Some(("", "/sys/fs/cgroup/unified")));
        assert_eq!(hierarchy("27 24 0:24 / / rw - ext4 /dev/vda rw"), None);
    }

    #[test]
    fn a_tree_of_cgroups_is_walked_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let below = root.path().join("c/below");
        fs::create_dir_all(&below).unwrap();
        fs::write(root.path().join("c/cgroup.procs"), "12\n13\n").unwrap();
        fs::write(below.join("cgroup.procs"), "13\n14\n").unwrap();
        let cgroups = [Cgroup {
            controllers: String::new(),
            directory: root.path().join("c"),
        }];
        let pids: Vec<_> = processes(&cgroups)
            .unwrap()
            .into_iter()
            .map(Pid::as_raw)
            .collect();
        assert_eq!(pids, [12, 13, 14]);
        // The files of a real cgroup directory don't stand in the way of its removal; these do.
        fs::remove_file(root.path().join("c/cgroup.procs")).unwrap();
        fs::remove_file(below.join("cgroup.procs")).unwrap();
        remove(&cgroups).unwrap();
        assert!(!root.path().join("c").exists());
        remove(&cgroups).unwrap();
    }
}
