//! The mounts that a process sees: `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nix::sys::stat::makedev;
use nix::unistd::Pid;

use super::procfs;

/// One mount, a line of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Number of the mount.
    pub id: u64,
    /// Number of the mount it is mounted in; of itself, or of one that the process does not see, at the top.
    pub parent: u64,
    /// Device of the superblock. Not what stat(2) says of its files on btrfs and some overlays.
    pub device: u64,
    /// The directory (or file) of the file system that is mounted, from the file system's own root.
    pub root: PathBuf,
    /// Where it is mounted, from the process's root directory.
    pub mount_point: PathBuf,
    /// Whether nothing can be written: the mount or the superblock is read-only.
    pub read_only: bool,
    /// Type of the file system, as `overlay`, `tmpfs`, `fuse.sshfs`.
    pub file_system: String,
    /// What was mounted, as the file system calls it.
    pub source: OsString,
    /// Options of the superblock, `NAME` or `NAME=VALUE`.
    options: Vec<OsString>,
}

impl Mount {
    /// The values of a superblock option, in order; an option without a value has the empty one.
    pub fn option<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a OsStr> {
        self.options.iter().filter_map(move |option| {
            let bytes = option.as_bytes();
            let rest = bytes.strip_prefix(name.as_bytes())?;
            match rest.strip_prefix(b"=") {
                Some(value) => Some(OsStr::from_bytes(value)),
                None if rest.is_empty() => Some(OsStr::new("")),
                None => None,
            }
        })
    }

    fn parse(line: &[u8]) -> Option<Mount> {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = number(fields.next()?)?;
        let parent = number(fields.next()?)?;
        let device = fields.next()?;
        let colon = device.iter().position(|byte| *byte == b':')?;
        let device = makedev(number(&device[..colon])?, number(&device[colon + 1..])?);
        let root = PathBuf::from(unescape(fields.next()?));
        let mount_point = PathBuf::from(unescape(fields.next()?));
        let flags = fields.next()?;
        // Optional fields, ended by a hyphen.
        fields.by_ref().find(|field| *field == b"-")?;
        let file_system = String::from_utf8(unescape(fields.next()?).into_vec()).ok()?;
        let source = unescape(fields.next()?);
        // A comma within a value is escaped, so the options are taken apart first.
        let options: Vec<OsString> = fields
            .next()?
            .split(|byte| *byte == b',')
            .map(unescape)
            .collect();
        let read_only =
            flags.split(|byte| *byte == b',').any(|flag| flag == b"ro") || options[0] == "ro";
        Some(Mount {
            id,
            parent,
            device,
            root,
            mount_point,
            read_only,
            file_system,
            source,
            options,
        })
    }
}

/// The mounts that a process sees, in the order of the file: a mount comes after the one it is in.
///
/// # Errors
///
/// Those of reading; `InvalidData` for a line that is not as the man page says.
pub fn read(pid: Pid) -> io::Result<Vec<Mount>> {
    parse(&fs::read(procfs::path(pid, "mountinfo"))?)
}

/// Our own.
///
/// # Errors
///
/// As [`read`].
pub fn read_own() -> io::Result<Vec<Mount>> {
    parse(&fs::read("/proc/self/mountinfo")?)
}

/// The mounts of a text as the file has it.
///
/// # Errors
///
/// As [`read`].
pub fn parse(text: &[u8]) -> io::Result<Vec<Mount>> {
    let lines = text.split(|byte| *byte == b'\n');
    lines
        .filter(|line| !line.is_empty())
        .map(|line| {
            Mount::parse(line).ok_or_else(|| {
                let line = String::from_utf8_lossy(line);
                io::Error::new(io::ErrorKind::InvalidData, format!("mountinfo: {line}"))
            })
        })
        .collect()
}

/// Those of the mounts that can be reached by a path. A mount is covered by another on top of it, or on a directory
/// above it in the same parent, or with its parent.
pub fn visible(mounts: &[Mount]) -> Vec<&Mount> {
    let on_top = |other: &Mount, mount: &Mount| {
        other.parent == mount.id && other.id != mount.id && other.mount_point == mount.mount_point
    };
    let above = |other: &Mount, mount: &Mount| {
        other.parent == mount.parent
            && other.mount_point != mount.mount_point
            && mount.mount_point.starts_with(&other.mount_point)
            && other.id != mount.parent
    };
    let is_visible = |mount: &&Mount| {
        if mounts.iter().any(|other| on_top(other, mount)) {
            return false;
        }
        let mut current = *mount;
        // The chain of parents is no longer than the list: a file that makes no sense must not make a circle.
        for _ in 0..mounts.len() {
            if mounts.iter().any(|other| above(other, current)) {
                return false;
            }
            match mounts.iter().find(|other| other.id == current.parent) {
                Some(parent) if parent.id != current.id => current = parent,
                _ => return true,
            }
        }
        true
    };
    mounts.iter().filter(is_visible).collect()
}

fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Takes the octal escapes (`\040`) away.
fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|digits| {
            byte == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit))
        });
        match digits {
            Some(digits) => {
                let value = digits
                    .iter()
                    .fold(0_u32, |value, digit| value * 8 + u32::from(digit - b'0'));
                plain.push(value as u8);
                rest = &after[3..];
            }
            None => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let line = b"65 43 0:39 /sub\\040dir /mnt/a\\134b rw,relatime shared:1 master:2 - overlay over\\011lay \
            ro,lowerdir=/l\\134\\054o\\134:w,upperdir=/u\\040p,userxattr\n";
        let mounts = parse(line).unwrap();
        let mount = &mounts[0];
        assert_eq!(
            (mount.id, mount.parent, mount.device),
            (65, 43, makedev(0, 39))
        );
        assert_eq!(mount.root, Path::new("/sub dir"));
        assert_eq!(mount.mount_point, Path::new("/mnt/a\\b"));
        assert!(mount.read_only);
        assert_eq!(mount.source, "over\tlay");
        assert_eq!(mount.option("lowerdir").collect::<Vec<_>>(), ["/l\\,o\\:w"]);
        assert_eq!(mount.option("upperdir").collect::<Vec<_>>(), ["/u p"]);
        assert_eq!(mount.option("userxattr").collect::<Vec<_>>(), [""]);
        assert_eq!(mount.option("user").count(), 0);
        assert!(parse(b"65 43 0:39 / /\n").is_err());
    }

    #[test]
    fn what_is_covered_is_not_visible() {
        let text = b"1 0 8:1 / / rw - ext4 a rw\n\
            2 1 0:2 / /a rw - tmpfs t rw\n\
            3 2 0:3 / /a/b rw - tmpfs t rw\n\
            4 1 0:4 / /c/d rw - tmpfs t rw\n\
            5 1 0:5 / /c rw - tmpfs t rw\n\
            6 5 0:6 / /c/e rw - tmpfs t rw\n\
            7 6 0:7 / /c/e rw - tmpfs t rw\n\
            8 2 0:8 / /a rw - tmpfs t rw\n\
            9 8 0:9 / /a/x rw - tmpfs t rw\n";
        let mounts = parse(text).unwrap();
        let ids: Vec<u64> = visible(&mounts).iter().map(|mount| mount.id).collect();
        // 2 is below 8, 3 in 2, 4 below 5, 6 below 7.
        assert_eq!(ids, [1, 5, 7, 8, 9]);
    }

    #[test]
    fn our_own_can_be_read() {
        // Others may mount things meanwhile.
        for mounts in [read_own().unwrap(), read(Pid::this()).unwrap()] {
            let proc = mounts
                .iter()
                .find(|mount| mount.mount_point == Path::new("/proc"));
            assert_eq!(proc.map(|mount| mount.file_system.as_str()), Some("proc"));
        }
    }
}
