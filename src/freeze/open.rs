//! Opening and closing the window into an address space.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::fault;
use crate::kernel::bootstrap::Opening;
use crate::kernel::runner::{self, LIVENESS_OFFSET};
use crate::kernel::userfaultfd::USER_MODE_ONLY;
use crate::kernel::window::Window;
use crate::kernel::{maps, pidfd};

use super::batch::Batch;
use super::bootstrap::Bootstrap;
use super::inject::{self, STORE_OFFSET, TargetWindow};
use super::stopped::Stopped;
use super::thread::Thread;
use super::tree::Member;
use super::{Context, Error, Result, refuse};

/// User code segment of 64-bit tasks on x86-64.
const USER_CS: u64 = 0x33;
/// Of memfd_create(2), Linux 6.3.
const MFD_EXEC: u32 = 0x10;
const WINDOW_NAME: &[u8] = b"snapback\0";

/// A userfaultfd that a process has made of its address space, or why it has not.
pub type Made = std::result::Result<OwnedFd, Errno>;

impl Stopped<'_> {
    /// Makes sure that a process has a window with a page store of at least `store` bytes. If it had none, returns the
    /// userfaultfd (`O_CLOEXEC`, `O_NONBLOCK`, user mode only) that it has made on the way.
    ///
    /// The first use in an address space costs two stops.
    pub fn open_window(&mut self, pid: Pid, store: usize) -> Result<Option<Made>> {
        self.open_window_at(pid, store, None)
    }

    /// As [`Stopped::open_window`], at an address of which nothing is known to be in the way of the window; what is there is
    /// replaced.
    pub fn open_window_at(
        &mut self,
        pid: Pid,
        store: usize,
        at: Option<u64>,
    ) -> Result<Option<Made>> {
        if self.member(pid)?.window.is_some() {
            return Ok(None);
        }
        let len = (STORE_OFFSET + store).next_multiple_of(4096);
        let process = self.processes.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let member = self.tree.members.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let thread = process.threads.first_mut().ok_or(Error::Gone(pid))?;
        if thread.registers()?.cs != USER_CS {
            return Err(refuse(
                pid,
                "a 32-bit program",
                "only 64-bit programs can be taken",
            ));
        }
        let (place, vmas) = Bootstrap::find(pid, &member.maps)?;
        for thread in &mut process.threads {
            if place.leads_home(thread.registers()?) {
                return Err(refuse(
                    pid,
                    format!("thread {}", thread.tid),
                    "it is on its way back from what a keeper that was killed had it do; try again",
                ));
            }
        }
        let thread = process.threads.first_mut().ok_or(Error::Gone(pid))?;
        let (wanted, flags) = match at {
            Some(address) => (address, libc::MAP_SHARED | libc::MAP_FIXED),
            None => (quiet_place(&vmas), libc::MAP_SHARED),
        };
        let opening = Opening {
            name: WINDOW_NAME,
            memfd_flags: libc::MFD_CLOEXEC | MFD_EXEC,
            place: (wanted, len as u64),
            protection: (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, flags),
            userfaultfd_flags: libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY,
        };
        let made = place.open(thread, &member.memory, &opening)?;
        fault::point("checkpoint.mapped");
        place.erase(&member.memory)?;
        let result = match made {
            [Ok(memfd), Ok(address), _] => {
                enter(thread, member, place, (memfd, address, len), made[2])
            }
            [Err(errno), _, _] => Err(refuse(
                pid,
                "its file table",
                format!(
                    "a descriptor is needed for a moment (memfd_create(2): {errno}); raise RLIMIT_NOFILE, or see `snapback check`"
                ),
            )),
            [_, Err(errno), _] => Err(refuse(
                pid,
                "its address space",
                format!("a window of {len} bytes can't be mapped: {errno}; raise RLIMIT_AS"),
            )),
        };
        result.map(Some).inspect_err(|_| {
            let [memfd, address, tracker] = made;
            let undo = [
                address.map(|address| (libc::SYS_munmap, [address, len as u64])),
                memfd.map(|fd| (libc::SYS_close, [fd, 0])),
                tracker.map(|fd| (libc::SYS_close, [fd, 0])),
            ];
            // What goes wrong here leaves a descriptor or a mapping more, which is not worth another error.
            let _ = place.call_each(thread, &member.memory, undo.into_iter().flatten());
        })
    }

    /// Notes that the kernel's own mappings in an address space are so many bytes further up now.
    pub fn special_mappings_moved(&mut self, pid: Pid, offset: u64) -> Result<()> {
        let member = self.tree.members.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let window = member.window.as_mut().ok_or(Error::Gone(pid))?;
        window.bootstrap.address = window.bootstrap.address.wrapping_add(offset);
        Ok(())
    }

    /// Removes a process's window from its address space. What was in its page store is gone.
    pub fn close_window(&mut self, pid: Pid) -> Result<()> {
        let process = self.processes.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let thread = process.threads.first_mut().ok_or(Error::Gone(pid))?;
        let member = self.tree.members.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let Some(mut target) = member.window.take() else {
            return Ok(());
        };
        target.hide();
        // The runner can't unmap itself and come back.
        let unmap = (
            libc::SYS_munmap,
            [target.address, target.window.len() as u64],
        );
        let unmapped = target
            .bootstrap
            .call_each(thread, &member.memory, [unmap])?;
        unmapped.map_err(|errno| Error::Call {
            pid,
            what: "munmap",
            errno,
        })
    }
}

/// Takes over the memfd of a window that is mapped, and makes the window fit for use.
fn enter(
    thread: &mut Thread,
    member: &mut Member,
    place: Bootstrap,
    (memfd, address, len): (u64, u64, usize),
    tracker: std::result::Result<u64, Errno>,
) -> Result<Made> {
    let pid = member.pid;
    let take = |fd: u64| pidfd::get_fd(member.pidfd.as_fd(), fd as i32);
    let file = take(memfd).context(|| format!("pidfd_getfd {pid} {memfd}"))?;
    let made = tracker.and_then(take);
    nix::unistd::ftruncate(&file, len as i64).context(|| "size a window".into())?;
    let window = Window::map(&file, len).context(|| "map a window".into())?;
    window.write(0, runner::code());
    let mut target = TargetWindow::new(address, window, place, thread.tid);
    let mut batch = Batch::new();
    let mut steps = vec![(batch.call(libc::SYS_close, &[memfd.into()]), "close")];
    if let Ok(fd) = tracker {
        steps.push((batch.call(libc::SYS_close, &[fd.into()]), "close"));
    }
    let store = (address + LIVENESS_OFFSET as u64).into();
    let arguments = [
        store,
        (len - LIVENESS_OFFSET).into(),
        libc::PROT_READ.into(),
    ];
    steps.push((batch.call(libc::SYS_mprotect, &arguments), "mprotect"));
    let arguments = [address.into(), len.into(), libc::MADV_DONTFORK.into()];
    steps.push((batch.call(libc::SYS_madvise, &arguments), "madvise"));
    let done = inject::run(thread, &mut target, &batch)?;
    for (step, what) in steps {
        done.result(step)
            .map_err(|errno| Error::Call { pid, what, errno })?;
    }
    member.window = Some(target);
    Ok(made)
}

/// The middle of the greatest gap between mappings. The kernel puts a program's next mappings right below the others,
/// and programs rely on what they find there.
fn quiet_place(vmas: &[maps::Vma]) -> u64 {
    const ALIGNMENT: u64 = 2 << 20;
    let gaps = vmas
        .windows(2)
        .filter(|pair| pair[1].end < 1 << 47)
        .map(|pair| (pair[0].end, pair[1].start));
    let (start, end) = gaps
        .max_by_key(|(start, end)| end - start)
        .unwrap_or((0, 0));
    (start + (end - start) / 2) & !(ALIGNMENT - 1)
}
