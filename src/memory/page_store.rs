//! The pages that checkpoints keep by copy, in the keeper's own memory. Each has a slot, which is counted as often as a
//! [`PageMap`](super::page_map::PageMap) has it; with the last of them it is free.

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::kernel::pages::Pages;

use super::PAGE;

/// Pages of one piece of memory.
const CHUNK: u32 = 4096;

/// A store, which all who have a part of it share.
#[derive(Debug, Clone, Default)]
pub struct PageStore(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    chunks: RwLock<Vec<Pages>>,
    slots: Mutex<Slots>,
}

/// Slot 0 is never given out.
#[derive(Debug, Default)]
struct Slots {
    /// How often each slot that was ever given out is had.
    counts: Vec<u32>,
    /// Slots whose pages are zero and take no memory.
    free: Vec<u32>,
    /// Slots that are free, but their pages are still there.
    left: Vec<u32>,
}

impl PageStore {
    /// Takes slots for `count` pages, each counted once; returns runs of them, by their first and their number.
    ///
    /// # Errors
    ///
    /// No memory can be mapped.
    pub(super) fn take(&self, count: u32) -> io::Result<Vec<(u32, u32)>> {
        let mut slots = self.0.slots.lock();
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for _ in 0..count {
            let slot = match slots.free.pop().or_else(|| slots.left.pop()) {
                Some(slot) => slot,
                None => {
                    let next = slots.counts.len().max(1) as u32;
                    slots.counts.resize(next as usize + 1, 0);
                    next
                }
            };
            slots.counts[slot as usize] = 1;
            match runs.last_mut() {
                // A run lies in one chunk.
                Some((first, len)) if *first + *len == slot && !slot.is_multiple_of(CHUNK) => {
                    *len += 1;
                }
                _ => runs.push((slot, 1)),
            }
        }
        let chunks = slots.counts.len().div_ceil(CHUNK as usize);
        drop(slots);
        let mut mapped = self.0.chunks.write();
        while mapped.len() < chunks {
            mapped.push(Pages::map(CHUNK as usize * PAGE as usize)?);
        }
        Ok(runs)
    }

    /// Gives the bytes of a run of slots that were just taken to `fill`.
    pub(super) fn fill<T>(&self, (first, len): (u32, u32), fill: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut chunks = self.0.chunks.write();
        let chunk = &mut chunks[(first / CHUNK) as usize];
        let at = (first % CHUNK) as usize * PAGE as usize;
        fill(chunk.bytes_mut(at, len as usize * PAGE as usize))
    }

    /// Gives the page of a slot to `look`.
    pub(super) fn look<T>(&self, slot: u32, look: impl FnOnce(&[u8]) -> T) -> T {
        let chunks = self.0.chunks.read();
        let chunk = &chunks[(slot / CHUNK) as usize];
        look(chunk.bytes((slot % CHUNK) as usize * PAGE as usize, PAGE as usize))
    }

    /// Counts slots once more.
    pub(super) fn share(&self, of: impl Iterator<Item = u32>) {
        let mut slots = self.0.slots.lock();
        of.for_each(|slot| slots.counts[slot as usize] += 1);
    }

    /// Counts slots once less.
    pub(super) fn give_back(&self, of: impl Iterator<Item = u32>) {
        let mut slots = self.0.slots.lock();
        for slot in of {
            slots.counts[slot as usize] -= 1;
            if slots.counts[slot as usize] == 0 {
                slots.left.push(slot);
            }
        }
    }

    /// How often a slot is had.
    pub(super) fn count(&self, slot: u32) -> u32 {
        self.0.slots.lock().counts[slot as usize]
    }

    /// Gives the memory of free slots back to the kernel: to be called when nothing waits for it.
    pub fn tidy(&self) {
        let mut left = std::mem::take(&mut self.0.slots.lock().left);
        if left.is_empty() {
            return;
        }
        left.sort_unstable_by(|one, other| other.cmp(one));
        let mut chunks = self.0.chunks.write();
        // Descending, so that the lowest are taken first.
        for run in left.chunk_by(|one, next| *one == next + 1 && !one.is_multiple_of(CHUNK)) {
            let (Some(last), len) = (run.last(), run.len()) else {
                continue;
            };
            let at = (last % CHUNK) as usize * PAGE as usize;
            let chunk = &mut chunks[(last / CHUNK) as usize];
            // If they can't be given back they are used again.
            if let Err(error) = chunk.discard(at, len * PAGE as usize) {
                tracing::warn!(%error, "pages that nobody needs are kept");
            }
        }
        drop(chunks);
        self.0.slots.lock().free.append(&mut left);
    }

    /// Bytes of pages that are had.
    pub fn bytes(&self) -> u64 {
        let slots = self.0.slots.lock();
        let given = slots.counts.len().saturating_sub(1);
        (given - slots.free.len() - slots.left.len()) as u64 * PAGE
    }

    /// Whether it is the same store.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_taken_again_before_more_is() {
        let store = PageStore::default();
        let runs = store.take(CHUNK + 5).unwrap();
        assert_eq!(runs, [(1, CHUNK - 1), (CHUNK, 6)]);
        store.fill(runs[1], |bytes| bytes.fill(9));
        assert_eq!(store.look(CHUNK + 5, |page| page[17]), 9);
        store.share([CHUNK + 5].into_iter());
        store.give_back([CHUNK + 5, CHUNK + 4, 3].into_iter());
        assert_eq!(store.bytes(), u64::from(CHUNK + 3) * PAGE);
        store.tidy();
        assert_eq!(
            store.take(3).unwrap(),
            [(3, 1), (CHUNK + 4, 1), (CHUNK + 6, 1)]
        );
        assert_eq!(store.look(CHUNK + 4, |page| page[17]), 0);
        assert_eq!(store.look(CHUNK + 5, |page| page[17]), 9);
    }
}
