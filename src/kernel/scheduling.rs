//! Scheduling of one thread: sched_setattr(2), sched_setaffinity(2).
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::unistd::Pid;

/// Words of `struct sched_attr` in its first version (`SCHED_ATTR_SIZE_VER0`, 48 bytes).
pub const ATTRIBUTE_WORDS: usize = 6;
/// Words of a processor mask as it is read and written here: 1024 processors, as `cpu_set_t`.
pub const PROCESSOR_WORDS: usize = 16;

/// `struct sched_attr` as sched_getattr(2) gives it: policy, flags, nice value, priority, deadline parameters.
pub type Attributes = [u64; ATTRIBUTE_WORDS];
/// The processors that a thread may run on, one bit each.
pub type Processors = [u64; PROCESSOR_WORDS];

/// Reads the scheduling attributes of a thread.
pub fn attributes(tid: Pid) -> Result<Attributes, Errno> {
    let mut attributes = [0; ATTRIBUTE_WORDS];
    // SAFETY: the buffer has the size that is passed.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            tid.as_raw(),
            attributes.as_mut_ptr(),
            size_of::<Attributes>(),
            0,
        )
    })?;
    Ok(attributes)
}

/// Sets the scheduling attributes of a thread. Raising them needs `CAP_SYS_NICE`.
pub fn set_attributes(tid: Pid, attributes: &Attributes) -> Result<(), Errno> {
    // SAFETY: `struct sched_attr` begins with its size, which sched_getattr(2) has filled in.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            tid.as_raw(),
            attributes.as_ptr(),
            0,
        )
    })
    .map(drop)
}

/// Reads the processors that a thread may run on.
pub fn processors(tid: Pid) -> Result<Processors, Errno> {
    let mut processors = [0; PROCESSOR_WORDS];
    // SAFETY: the buffer has the size that is passed.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            tid.as_raw(),
            size_of::<Processors>(),
            processors.as_mut_ptr(),
        )
    })?;
    Ok(processors)
}

/// Sets the processors that a thread may run on.
pub fn set_processors(tid: Pid, processors: &Processors) -> Result<(), Errno> {
    // SAFETY: the buffer has the size that is passed.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            tid.as_raw(),
            size_of::<Processors>(),
            processors.as_ptr(),
        )
    })
    .map(drop)
}

/// Moves this thread to another processor if it runs on one of `theirs` and may run elsewhere; says whether it did, which
/// takes some 10 us. It may come back, but a thread that runs is seldom moved.
pub fn move_away(theirs: impl IntoIterator<Item = usize>) -> bool {
    let theirs: Vec<usize> = theirs.into_iter().collect();
    if !nix::sched::sched_getcpu().is_ok_and(|here| theirs.contains(&here)) {
        return false;
    }
    let tid = nix::unistd::gettid();
    let Ok(allowed) = processors(tid) else {
        return false;
    };
    let mut others = allowed;
    for processor in theirs {
        if let Some(word) = others.get_mut(processor / 64) {
            *word &= !(1 << (processor % 64));
        }
    }
    // Refused if nothing is left, or nothing that the cpuset has.
    let moved = set_processors(tid, &others).is_ok();
    if moved && let Err(error) = set_processors(tid, &allowed) {
        tracing::warn!(%error, "sched_setaffinity");
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_can_be_set() {
        let me = nix::unistd::gettid();
        let attributes = attributes(me).unwrap();
        assert_eq!(attributes[0] as u32 as usize, size_of::<Attributes>());
        set_attributes(me, &attributes).unwrap();
        let processors = processors(me).unwrap();
        set_processors(me, &processors).unwrap();
    }

    #[test]
    fn a_thread_moves_away_and_may_run_where_it_might() {
        let me = nix::unistd::gettid();
        let before = processors(me).unwrap();
        assert!(!move_away(0..PROCESSOR_WORDS * 64), "there is nowhere else");
        assert!(!move_away([]), "it is elsewhere");
        let count: u32 = before.iter().map(|word| word.count_ones()).sum();
        // It may be moved by others between the two calls, but not for ever.
        let moves = || move_away([nix::sched::sched_getcpu().unwrap()]);
        assert_eq!((0..1000).any(|_| moves()), count > 1);
        assert_eq!(processors(me).unwrap(), before);
    }
}
