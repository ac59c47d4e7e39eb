//! Making System V shared memory segments (sysvipc(7)) in another IPC namespace.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};

/// A segment that is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its number.
    pub id: i32,
    /// Its key; 0 for none (`IPC_PRIVATE`).
    pub key: i32,
    /// Its owner.
    pub user: u32,
    /// Its group.
    pub group: u32,
    /// Permissions.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
}

impl Segment {
    /// Whether it goes with the last that has it attached (`SHM_DEST`, shmctl(2)).
    pub fn is_removed(&self) -> bool {
        self.mode & 0o1000 != 0
    }
}

/// Which number the next segment gets (Linux 3.8, `CONFIG_CHECKPOINT_RESTORE`), in the namespace of who writes to it.
const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";

/// Makes a segment in an IPC namespace, a `/proc/PID/ns/ipc` held open, and has `fill` write its content.
///
/// # Errors
///
/// What the kernel says; `EEXIST` if number or key are taken there.
pub fn make(
    namespace: BorrowedFd<'_>,
    segment: Segment,
    fill: &mut (dyn FnMut(&mut [u8]) -> io::Result<()> + Send),
) -> io::Result<()> {
    // The namespace is a thread's own, so a thread is made for it.
    std::thread::scope(|scope| {
        let in_there = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWIPC)?;
            make_here(segment, fill)
        });
        in_there
            .join()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    })
}

/// Removes segments in an IPC namespace: those that are attached go with the last that has them.
///
/// # Errors
///
/// What shmctl(2) says.
pub fn remove(namespace: BorrowedFd<'_>, ids: &[i32]) -> io::Result<()> {
    std::thread::scope(|scope| {
        let in_there = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWIPC)?;
            ids.iter().try_for_each(|id| {
                // SAFETY: IPC_RMID takes no structure.
                let done = unsafe { libc::shmctl(*id, libc::IPC_RMID, std::ptr::null_mut()) };
                Errno::result(done).map(drop).map_err(io::Error::from)
            })
        });
        in_there
            .join()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    })
}

fn make_here(
    segment: Segment,
    fill: &mut (dyn FnMut(&mut [u8]) -> io::Result<()> + Send),
) -> io::Result<()> {
    let size = usize::try_from(segment.size).map_err(|_| io::ErrorKind::InvalidInput)?;
    std::fs::write(NEXT_ID, segment.id.to_string())?;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (segment.mode & 0o777) as i32;
    // SAFETY: takes integers.
    let id = Errno::result(unsafe { libc::shmget(segment.key, size, flags) })?;
    let done = fill_and_own(id, segment, size, fill);
    let done = done.and_then(|()| match id == segment.id {
        true => Ok(()),
        false => Err(Errno::EEXIST.into()),
    });
    if done.is_err() {
        // SAFETY: IPC_RMID takes no structure.
        unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    }
    done
}

fn fill_and_own(
    id: i32,
    segment: Segment,
    size: usize,
    fill: &mut (dyn FnMut(&mut [u8]) -> io::Result<()> + Send),
) -> io::Result<()> {
    // SAFETY: at an address of the kernel's choice, so over nothing that is there.
    let address = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if address as isize == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the segment is `size` bytes long, was made just now, zeroed, and nobody else knows of it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(address.cast::<u8>(), size) };
    let filled = fill(bytes);
    // SAFETY: attached just now, and not borrowed any more.
    Errno::result(unsafe { libc::shmdt(address) })?;
    filled?;
    // SAFETY: all zeroes is a value of it.
    let mut status: libc::shmid_ds = unsafe { std::mem::zeroed() };
    status.shm_perm.uid = segment.user;
    status.shm_perm.gid = segment.group;
    status.shm_perm.mode = (segment.mode & 0o777) as _;
    // SAFETY: IPC_SET reads the structure, which outlives the call.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut status) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_segment_has_number_key_and_content() {
        // In a namespace of this test's own: numbers are few.
        std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWIPC).unwrap();
            let own = File::open("/proc/thread-self/ns/ipc").unwrap();
            let segment = Segment {
                id: 0x8003,
                key: 77,
                user: 12,
                group: 13,
                mode: 0o640,
                size: 5000,
            };
            let mut fill = |bytes: &mut [u8]| {
                bytes[4999] = 9;
                Ok(())
            };
            make(own.as_fd(), segment, &mut fill).unwrap();
            let again = make(own.as_fd(), segment, &mut fill).unwrap_err();
            assert_eq!(again.raw_os_error(), Some(libc::EEXIST));
            let text = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
            let line = text.lines().nth(1).unwrap();
            let words: Vec<&str> = line.split_whitespace().collect();
            assert_eq!(&words[..4], ["77", "32771", "640", "5000"], "{text}");
            assert_eq!(&words[7..9], ["12", "13"], "{text}");
            // SAFETY: takes integers and an address of the kernel's choice; reads a byte of what is mapped.
            unsafe {
                let address = libc::shmat(0x8003, std::ptr::null(), libc::SHM_RDONLY);
                assert_eq!(*address.cast::<u8>().add(4999), 9);
            }
        })
        .join()
        .unwrap();
    }
}
