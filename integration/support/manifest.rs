//! What a container's files are at one point in time: a reference to compare with, made by none of snapback's own code.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use super::session::{DONE, finish};

/// Every file below the root directory of a process, kernel file systems left out: kind, mode, owner, size, times,
/// links, device, attributes, and a digest of the content.
#[derive(Debug, PartialEq, Eq, Clone)]
pub(crate) struct Manifest(BTreeMap<PathBuf, String>);

/// One line per file: path, and the rest as one text. `%` of find(1) has no attributes and no digest.
const LIST: &str = r#"
import hashlib, os, stat, sys

def walk(directory, device):
    for entry in sorted(os.scandir(directory), key=lambda entry: os.fsencode(entry.name)):
        show(entry.path, device)

def show(path, device):
    info = os.lstat(path)
    mode = info.st_mode
    words = [oct(mode), info.st_uid, info.st_gid, info.st_mtime_ns, info.st_rdev]
    # Of a directory, links and size are the file system's own business.
    if not stat.S_ISDIR(mode):
        words += [info.st_size, info.st_nlink]
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        words += [name, os.getxattr(path, name, follow_symlinks=False).hex()]
    if stat.S_ISLNK(mode):
        words.append(os.readlink(path))
    elif stat.S_ISREG(mode):
        with open(path, "rb") as file:
            words.append(hashlib.sha1(file.read()).hexdigest())
    print(repr(path), *words, sep="\t")
    if stat.S_ISDIR(mode):
        # A mount that is not asked for by itself is left out.
        inner = os.stat(path).st_dev
        if inner == device:
            walk(path, device)

for top in sys.argv[1:]:
    show(top, os.stat(top).st_dev)
"#;

impl Manifest {
    /// Of these mount points of the process's.
    #[track_caller]
    pub(crate) fn of(pid: i32, mount_points: &[&str]) -> Self {
        let root = format!("/proc/{pid}/root");
        let mut command = Command::new("python3");
        command.args(["-c", LIST]);
        for place in mount_points {
            command.arg(format!("{root}{place}"));
        }
        let listed = finish(command).expect(DONE, "listing files");
        let line = |line: &str| {
            let (path, rest) = line.split_once('\t').expect("a path");
            (PathBuf::from(path.replace(&root, "")), rest.to_owned())
        };
        Self(listed.out.lines().map(line).collect())
    }

    /// Fails the test, naming what differs, unless both are the same.
    #[track_caller]
    pub(crate) fn expect(&self, expected: &Self, when: &str) {
        let paths = self.0.keys().chain(expected.0.keys());
        let mut different: Vec<String> = paths
            .filter(|path| self.0.get(*path) != expected.0.get(*path))
            .map(|path| {
                let show = |manifest: &Self| manifest.0.get(path).cloned();
                format!(
                    "{}: expected {:?}, got {:?}",
                    path.display(),
                    show(expected),
                    show(self)
                )
            })
            .collect();
        different.dedup();
        let shown = &different[..different.len().min(20)];
        assert!(
            different.is_empty(),
            "{} files differ {when}: {shown:#?}",
            different.len()
        );
    }

    /// How many files there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}
