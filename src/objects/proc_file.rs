//! Files that `/proc` has of a process. They end with it, also for who holds them open, and a process that is made again under
//! its number has others.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::sys::stat::fstat;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

use super::file::{Form, State, open_path};
use super::model::Common;
use super::reborn::{Gone, Stead};

/// The process, and the name of the file, of a path as `/proc/7/maps`.
fn parts(path: &str) -> Option<(i32, &str)> {
    let path = path.strip_prefix("/proc/")?;
    let (number, name) = path.split_once('/').unwrap_or((path, ""));
    Some((number.parse().ok()?, name))
}

/// Whether a file system is the one that we see at `/proc` ourselves, in which processes have the numbers that they have for us.
fn is_ours(device: u64) -> bool {
    std::fs::metadata("/proc").is_ok_and(|at| at.dev() == device)
}

/// Of which of these processes a file is, which is pinned.
pub(super) fn owner<'g>(
    state: &State,
    common: &Common,
    pin: &OwnedFd,
    gone: &'g Gone,
) -> Option<(i32, &'g Stead)> {
    let (number, _) = parts(&state.path).filter(|_| state.form == Form::Plain)?;
    if fstatfs(pin.as_fd()).ok()?.filesystem_type() != PROC_SUPER_MAGIC {
        return None;
    }
    let is_it = |(pid, stead): &(&i32, &Stead)| match is_ours(common.dev) {
        true => **pid == number,
        false => stead.number == number,
    };
    let owner = gone.iter().find(is_it);
    owner.map(|(pid, stead)| (*pid, stead))
}

/// Where `/proc` of a recorded file is for a process, if that sees the same.
fn directory(common: &Common, pid: i32) -> Option<String> {
    let directory = match is_ours(common.dev) {
        true => "/proc".to_owned(),
        false => format!("/proc/{pid}/root/proc"),
    };
    let is_it = std::fs::metadata(&directory).is_ok_and(|at| at.dev() == common.dev);
    is_it.then_some(directory)
}

/// Whether it can be had again once its process was made again: it must be there at once, as what threads and descriptors have
/// is not, and be seen by another that sees what the process will.
pub(super) fn is_had_again(state: &State, common: &Common, other: i32) -> bool {
    parts(&state.path).is_some_and(|(_, name)| !name.contains('/'))
        && directory(common, other).is_some()
}

/// A pin on that file of the process that was made again, of which inode and path are noted.
pub(super) fn again(state: &mut State, common: &mut Common, pid: i32) -> Option<OwnedFd> {
    let (number, name) = parts(&state.path)?;
    let number = if is_ours(common.dev) { pid } else { number };
    let pin = open_path(&format!("{}/{number}/{name}", directory(common, pid)?)).ok()?;
    common.ino = fstat(pin.as_raw_fd()).ok()?.st_ino;
    state.path = format!("/proc/{number}/{name}")
        .trim_end_matches('/')
        .into();
    Some(pin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> (State, Common, OwnedFd) {
        let pin = open_path(path).unwrap();
        let at = std::fs::metadata(path).unwrap();
        let state = State {
            form: Form::Plain,
            path: path.into(),
            pinned: false,
            seals: 0,
        };
        let common = Common {
            dev: at.dev(),
            ino: at.ino(),
            mode: at.mode(),
            flags: 0,
            offset: 0,
            rdev: 0,
        };
        (state, common, pin)
    }

    #[test]
    fn a_file_of_a_process_is_told_from_others() {
        let me = std::process::id() as i32;
        let gone: Gone = [(
            me,
            Stead {
                other: me,
                number: 7,
            },
        )]
        .into();
        let (state, common, pin) = file(&format!("/proc/{me}/maps"));
        let found = owner(&state, &common, &pin, &gone);
        assert_eq!(found.map(|(pid, _)| pid), Some(me));
        assert!(is_had_again(&state, &common, me));
        let (mut had, mut found) = (state.clone(), common);
        again(&mut had, &mut found, me).unwrap();
        assert_eq!((had, found), (state, common));

        let of_thread = format!("/proc/{me}/task/{me}/stat");
        let (state, common, _) = file(&of_thread);
        assert!(!is_had_again(&state, &common, me));
        let (state, common, pin) = file("/proc/1/stat");
        assert!(owner(&state, &common, &pin, &gone).is_none());
        let (mut state, common, pin) = file("/etc/passwd");
        state.path = format!("/proc/{me}/maps");
        assert!(owner(&state, &common, &pin, &gone).is_none());
    }
}
