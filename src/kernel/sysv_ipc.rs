//! System V semaphores and message queues (sysvipc(7)) of our own IPC namespace: who used them last.
#![allow(unsafe_code)]

use nix::errno::Errno;

/// A number of a set of semaphores or of a queue.
pub type Id = i32;

/// The sets of semaphores, and the PIDs that operated last on a semaphore of each.
pub fn semaphores() -> std::io::Result<Vec<(Id, Vec<i32>)>> {
    let text = std::fs::read_to_string("/proc/sysvipc/sem")?;
    let parse = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let id: Id = words.next()?.parse().ok()?;
        let count: i32 = words.nth(1)?.parse().ok()?;
        Some((
            id,
            (0..count).filter_map(|number| last(id, number)).collect(),
        ))
    };
    Ok(text.lines().skip(1).filter_map(parse).collect())
}

/// Who operated last on a semaphore; `None` if it is gone or can't be read.
fn last(id: Id, number: i32) -> Option<i32> {
    // SAFETY: GETPID takes no fourth argument.
    Errno::result(unsafe { libc::semctl(id, number, libc::GETPID) }).ok()
}

/// The queues, and the PIDs that sent to and received from each last.
pub fn queues() -> std::io::Result<Vec<(Id, Vec<i32>)>> {
    let text = std::fs::read_to_string("/proc/sysvipc/msg")?;
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words.get(at)?.parse().ok();
        Some((number(1)?, vec![number(5)?, number(6)?]))
    };
    Ok(text.lines().skip(1).filter_map(parse).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_knows_who_used_it() {
        // SAFETY: takes integers.
        let id = unsafe { libc::semget(libc::IPC_PRIVATE, 2, 0o600) };
        assert!(id >= 0);
        // SAFETY: SETVAL takes an int.
        assert_eq!(unsafe { libc::semctl(id, 1, libc::SETVAL, 3) }, 0);
        let found = semaphores().unwrap();
        // SAFETY: IPC_RMID takes no fourth argument.
        assert_eq!(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }, 0);
        let own = std::process::id() as i32;
        let users = found.into_iter().find(|(other, _)| *other == id);
        assert!(users.is_some_and(|(_, users)| users.len() == 2 && users.contains(&own)));
    }
}
