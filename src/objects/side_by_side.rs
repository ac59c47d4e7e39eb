//! Looking at many descriptions by several threads: each takes some dozens of system calls of ours, none of which need the
//! thread that traces the tree.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::Error;

/// To look at so many takes as long as to start a thread, a few times over.
const BLOCK: usize = 32;
/// More threads would wait for one another in the kernel, and each asks for lists of its own (`socket_diag`).
const MOST_THREADS: usize = 4;

/// What `look` finds in each of `items`, in their order; or the error of the first that has one, if threads do not tell of a
/// later one before.
pub(super) fn each<T: Sync, R: Send>(
    items: &[T],
    look: impl Fn(&T) -> Result<R, Error> + Sync,
) -> Result<Vec<R>, Error> {
    let wanted = MOST_THREADS.min(items.len() / BLOCK / 2);
    // To ask how many there may be takes 25 us, as it reads what the cgroup allows.
    let allowed = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if wanted < 2 { 1 } else { wanted.min(allowed()) };
    if threads < 2 {
        return items.iter().map(look).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Vec<R>)>, Error> {
        let mut done = Vec::new();
        loop {
            let start = next.fetch_add(BLOCK, Ordering::Relaxed);
            let Some(rest) = items.get(start..).filter(|rest| !rest.is_empty()) else {
                return Ok(done);
            };
            let block = rest.iter().take(BLOCK);
            done.push((start, block.map(&look).collect::<Result<_, _>>()?));
        }
    };
    let found = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let ours = work();
        let others = others.into_iter().map(|thread| {
            let lost = |_| Error::Own {
                call: "a thread of ours",
                errno: nix::errno::Errno::EIO,
            };
            thread.join().map_err(lost).and_then(|done| done)
        });
        let all = std::iter::once(ours).chain(others);
        all.collect::<Result<Vec<_>, Error>>()
    });
    let mut blocks: Vec<_> = found?.into_iter().flatten().collect();
    blocks.sort_by_key(|(start, _)| *start);
    Ok(blocks.into_iter().flat_map(|(_, block)| block).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_looked_at_once_and_come_in_order() {
        for count in [0, 1, 2 * BLOCK, 4 * BLOCK + 1, 1000] {
            let items: Vec<usize> = (0..count).collect();
            let looks = AtomicUsize::new(0);
            let doubled = each(&items, |item| {
                looks.fetch_add(1, Ordering::Relaxed);
                Ok(item * 2)
            });
            let expected: Vec<usize> = items.iter().map(|item| item * 2).collect();
            assert_eq!(doubled.unwrap(), expected);
            assert_eq!(looks.into_inner(), count);
        }
    }

    #[test]
    fn an_error_is_told() {
        let items: Vec<usize> = (0..1000).collect();
        let found = each(&items, |item| match item {
            777 => Err(Error::Own {
                call: "read",
                errno: nix::errno::Errno::EIO,
            }),
            item => Ok(*item),
        });
        assert!(matches!(found, Err(Error::Own { call: "read", .. })));
    }
}
