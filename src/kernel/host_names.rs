//! The names of a UTS namespace (uts_namespaces(7)): those of the host and of its NIS domain.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::utsname::uname;
use nix::unistd::{Pid, sethostname};

use super::procfs;

/// Room for a name and its NUL (`__NEW_UTS_LEN`), in whole words.
pub const ROOM: usize = 72;
/// Bytes of a member of `struct utsname`.
pub const MEMBER: usize = 65;

/// The host's name and the domain's, padded with NULs.
pub type Names = [[u8; ROOM]; 2];

/// None.
pub const NOBODYS: Names = [[0; ROOM]; 2];

/// The names in what uname(2) has filled in.
#[must_use]
pub fn of(utsname: &[u8]) -> Names {
    // sysname, nodename, release, version, machine, domainname.
    [1, 5].map(|member| {
        let mut name = [0; ROOM];
        let bytes = utsname.iter().skip(member * MEMBER).take(MEMBER);
        let bytes = bytes.take_while(|byte| **byte != 0);
        name.iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        name
    })
}

/// Whether a process is in our own namespace.
///
/// # Errors
///
/// Those of looking at `/proc/PID/ns/uts`.
pub fn are_ours(pid: Pid) -> io::Result<bool> {
    let link = |path| std::fs::read_link(path);
    Ok(link(procfs::path(pid, "ns/uts"))? == link("/proc/self/ns/uts".into())?)
}

/// Sets the names in the namespace of a process.
///
/// # Errors
///
/// Those of setns(2), sethostname(2) and setdomainname(2).
pub fn set(pid: Pid, names: &Names) -> io::Result<()> {
    let [host, domain] = [0, 1].map(|which| {
        let name = &names[which];
        let length = name.iter().position(|byte| *byte == 0).unwrap_or(ROOM);
        &name[..length]
    });
    inside(pid, || {
        use std::os::unix::ffi::OsStrExt;
        sethostname(std::ffi::OsStr::from_bytes(host))?;
        // SAFETY: the kernel reads so many bytes of a slice that outlives the call.
        Errno::result(unsafe { libc::setdomainname(domain.as_ptr().cast(), domain.len()) })?;
        Ok(())
    })
}

/// The names in the namespace of a process.
///
/// # Errors
///
/// Those of setns(2) and uname(2).
pub fn read(pid: Pid) -> io::Result<Names> {
    use std::os::unix::ffi::OsStrExt;
    inside(pid, || {
        let all = uname()?;
        let mut utsname = [0; 6 * MEMBER];
        for (member, name) in [(1, all.nodename()), (5, all.domainname())] {
            let bytes = name.as_bytes();
            utsname[member * MEMBER..][..bytes.len()].copy_from_slice(bytes);
        }
        Ok(of(&utsname))
    })
}

/// Runs something on a thread in the namespace of a process.
fn inside<T: Send>(pid: Pid, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(procfs::path(pid, "ns/uts"))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(&namespace, CloneFlags::CLONE_NEWUTS)?;
            work()
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_are_what_uname_says() {
        assert!(are_ours(Pid::this()).unwrap());
        let [host, _] = read(Pid::this()).unwrap();
        let host = String::from_utf8_lossy(&host).into_owned();
        let told = nix::unistd::gethostname().unwrap();
        assert_eq!(host.trim_end_matches('\0'), told.to_string_lossy());
    }
}
