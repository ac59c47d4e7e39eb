//! What mlock(2) and mlockall(2) keep in RAM.

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::freeze::{Batch, Output, Outputs, StepId};
use crate::kernel::{procfs, smaps};

use super::ranges::Span;
use super::space::system;
use super::{PAGE, Result};

/// Shown in `smaps` for memory that is locked, and for such as is locked when it is touched.
pub(super) const LOCKED: &str = "lo";
/// See [`LOCKED`].
pub(super) const ON_FAULT: &str = "lf";

/// A span that was locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Locked {
    /// Where it is.
    pub(super) span: Span,
    /// 1: its pages are locked when they are touched, not before (`MLOCK_ONFAULT`).
    pub(super) on_fault: u64,
}

/// The spans that are locked now. A shadow does not know: fork does not inherit it. `smaps` is read only if there are some.
pub(super) fn read(pid: Pid) -> Result<Vec<Locked>> {
    let read = |name: &str| {
        std::fs::read_to_string(procfs::path(pid, name))
            .map_err(|error| system(pid, &format!("read /proc/{pid}/{name}"), error))
    };
    if procfs::status_line(&read("status")?, "VmLck").is_none_or(|size| size.starts_with("0 ")) {
        return Ok(Vec::new());
    }
    let locked = smaps::parse(&read("smaps")?)
        .into_iter()
        .filter(|flags| flags.has(LOCKED));
    Ok(locked
        .map(|flags| Locked {
            span: Span {
                start: flags.start,
                end: flags.end,
            },
            on_fault: u64::from(flags.has(ON_FAULT)),
        })
        .collect())
}

/// Asks whether what is mapped next will be locked (`MCL_FUTURE`), which nothing tells: a page is mapped for the time.
#[derive(Debug)]
pub(super) struct Question {
    mapped: StepId,
    synchronized: StepId,
    there: Output,
}

impl Question {
    /// Adds it to a batch.
    pub(super) fn add(batch: &mut Batch) -> Self {
        let (zero, page) = (0.into(), PAGE.into());
        let protection = (libc::PROT_READ | libc::PROT_WRITE).into();
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).into();
        let arguments = [zero, page, protection, flags, (-1).into(), zero];
        let mapped = batch.call(libc::SYS_mmap, &arguments);
        // Without its page nothing can be asked of it.
        let there = batch.output(8);
        let arguments = [mapped.into(), page, libc::MS_INVALIDATE.into()];
        let synchronized = batch.call(libc::SYS_msync, &arguments);
        batch.call(libc::SYS_mincore, &[mapped.into(), page, there.arg()]);
        batch.call(libc::SYS_munmap, &[mapped.into(), page]);
        Self {
            mapped,
            synchronized,
            there,
        }
    }

    /// `MCL_FUTURE`, perhaps with `MCL_ONFAULT`, or 0.
    pub(super) fn read(&self, done: &Outputs) -> u64 {
        match (done.result(self.mapped), done.result(self.synchronized)) {
            // More may not be locked.
            (Err(Errno::EAGAIN), _) => libc::MCL_FUTURE as u64,
            (Ok(_), Err(Errno::EBUSY)) if done.bytes(&self.there)[0] & 1 == 0 => {
                (libc::MCL_FUTURE | libc::MCL_ONFAULT) as u64
            }
            (Ok(_), Err(Errno::EBUSY)) => libc::MCL_FUTURE as u64,
            _ => 0,
        }
    }
}

/// Adds the step that makes future mappings locked as recorded; none: that they are not, and that nothing else is.
pub(super) fn restore_future(batch: &mut Batch, recorded: u64) {
    if recorded == 0 {
        batch.call(libc::SYS_munlockall, &[]);
    } else {
        batch.call(libc::SYS_mlockall, &[recorded.into()]);
    }
}

/// Adds the step that locks a span as it was.
pub(super) fn restore(batch: &mut Batch, span: Span, locked: bool, on_fault: bool) {
    const MLOCK_ONFAULT: i32 = 1;
    let [start, len] = [span.start.into(), span.len().into()];
    match (locked, on_fault) {
        (true, true) => batch.call(libc::SYS_mlock2, &[start, len, MLOCK_ONFAULT.into()]),
        (true, false) => batch.call(libc::SYS_mlock, &[start, len]),
        (false, _) => batch.call(libc::SYS_munlock, &[start, len]),
    };
}
