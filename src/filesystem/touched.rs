//! Which inodes have changed since when: the journal of inodes, and what each checkpoint needs of it.
//!
//! A checkpoint is equal to the live files at a moment of a stop, which has a number. What was told of later, or was told of and
//! not looked at until then, may differ from it, and nothing else, whichever checkpoints the tree was rolled back to since. A
//! change within the same tick of the clock may not be told of, unless times were looked at in between: so only what was
//! looked at after it was told of counts as done with.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;

use crate::kernel::inode_changes::InodeChanges;

/// An inode: device and number.
type Inode = (u64, u64);

/// Inodes that are remembered, at most.
const MOST: usize = 1 << 20;

/// The journal.
#[derive(Debug)]
pub struct Touched {
    source: InodeChanges,
    moments: Moments,
}

impl Touched {
    /// Begins with no file system.
    ///
    /// # Errors
    ///
    /// This kernel can't, or we may not.
    pub fn start() -> io::Result<Self> {
        Ok(Self {
            source: InodeChanges::start()?,
            moments: Moments::default(),
        })
    }

    /// Watches a file system from now on. False: it can't be.
    pub fn watch(&mut self, device: u64) -> bool {
        self.source.watch(device)
    }

    /// Takes what has changed until now. `begins`: what can't be told is looked for anew after this, and before [`Self::rest`].
    /// False: something is missing.
    pub fn take(&mut self, begins: bool) -> bool {
        let pending = &mut self.moments.pending;
        let complete = self.source.take(|device, number| {
            pending.insert((device, number));
        });
        let complete = complete && self.moments.pending.len() <= MOST;
        if !complete {
            tracing::debug!("changes of files came faster than they were taken");
            self.moments.lose(begins);
        }
        complete
    }

    /// What may differ from what was equal to the live files at a moment. `None`: anything.
    pub fn since(&self, device: u64, moment: u64) -> Option<HashSet<u64>> {
        self.moments.since(device, moment)
    }

    /// Whether an inode has changed and was not looked at since.
    pub fn is_pending(&self, device: u64, number: u64) -> bool {
        self.moments.pending.contains(&(device, number))
    }

    /// What has changed and was not looked at since.
    pub fn pending(&self, device: u64) -> HashSet<u64> {
        let pending = self.moments.pending.iter();
        let of_device = pending.filter(|inode| inode.0 == device);
        of_device.map(|inode| inode.1).collect()
    }

    /// An inode has to be looked at again.
    pub fn again(&mut self, device: u64, number: u64) {
        self.moments.pending.insert((device, number));
    }

    /// An inode was looked at after the journal was taken.
    pub fn looked_at(&mut self, device: u64, number: u64) {
        self.moments.looked_at((device, number));
    }

    /// The number of the moment at which [`Self::rest`] will be called next.
    pub fn next(&self) -> u64 {
        self.moments.next()
    }

    /// The end of an operation, in the stop. False: something is missing.
    pub fn rest(&mut self) -> bool {
        let complete = self.take(false);
        self.moments.rest();
        complete
    }
}

/// When which inodes were told of.
#[derive(Debug, Default)]
struct Moments {
    /// The last moment.
    now: u64,
    /// Nothing is missing since this one.
    complete_since: u64,
    /// Told of and not looked at.
    pending: HashSet<Inode>,
    /// Told of since the last moment and looked at.
    looked: HashSet<Inode>,
    /// The last moment before which each was told of.
    last: HashMap<Inode, u64>,
    /// The same by moments.
    at: BTreeMap<u64, HashSet<Inode>>,
}

impl Moments {
    fn lose(&mut self, begins: bool) {
        self.complete_since = self.next() + u64::from(!begins);
        *self = Self {
            now: self.now,
            complete_since: self.complete_since,
            ..Self::default()
        };
    }

    fn since(&self, device: u64, moment: u64) -> Option<HashSet<u64>> {
        if moment < self.complete_since {
            return None;
        }
        let later = self.at.range(moment + 1..).flat_map(|(_, inodes)| inodes);
        let all = later.chain(&self.pending).chain(&self.looked);
        let of_device = all.filter(|inode| inode.0 == device);
        Some(of_device.map(|inode| inode.1).collect())
    }

    fn looked_at(&mut self, inode: Inode) {
        if self.pending.remove(&inode) {
            self.looked.insert(inode);
        }
    }

    fn next(&self) -> u64 {
        self.now + 1
    }

    fn rest(&mut self) {
        let next = self.next();
        let looked = std::mem::take(&mut self.looked);
        let pending = std::mem::take(&mut self.pending);
        self.move_to(next, looked);
        self.move_to(next + 1, pending);
        self.now = next + 1;
        if self.last.len() > MOST {
            self.lose(false);
        }
    }

    fn move_to(&mut self, moment: u64, inodes: HashSet<Inode>) {
        if inodes.is_empty() {
            return;
        }
        for inode in &inodes {
            if let Some(before) = self.last.insert(*inode, moment)
                && let Some(others) = self.at.get_mut(&before)
            {
                others.remove(inode);
                if others.is_empty() {
                    self.at.remove(&before);
                }
            }
        }
        self.at.entry(moment).or_default().extend(inodes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Touch(u64),
        Look(u64),
        /// A checkpoint is taken, or the tree is rolled back to one.
        Rest(usize),
        Lose(bool),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0..6u64).prop_map(Step::Touch),
            4 => (0..6u64).prop_map(Step::Look),
            3 => (0..4usize).prop_map(Step::Rest),
            1 => any::<bool>().prop_map(Step::Lose),
        ];
        proptest::collection::vec(step, 0..60)
    }

    proptest! {
        /// The model has a version of each inode, which a change makes another, seen or not: one that was not looked at may
        /// change again without being told of.
        #[test]
        fn what_may_differ_is_told(steps in steps()) {
            let mut moments = Moments::default();
            let mut versions = [0u64; 6];
            let mut quiet = [true; 6];
            let mut checkpoints: HashMap<usize, (u64, [u64; 6])> = HashMap::new();
            for step in steps {
                match step {
                    Step::Touch(number) => {
                        moments.pending.insert((1, number));
                        versions[number as usize] += 1;
                        quiet[number as usize] = false;
                    }
                    Step::Look(number) => {
                        moments.looked_at((1, number));
                        quiet[number as usize] = true;
                    }
                    Step::Rest(name) => {
                        // Whatever was told of earlier has been looked at for this.
                        for (number, quiet) in quiet.iter_mut().enumerate() {
                            *quiet |= !moments.pending.contains(&(1, number as u64));
                        }
                        checkpoints.insert(name, (moments.next(), versions));
                        moments.rest();
                        // What is not told of.
                        for (version, quiet) in versions.iter_mut().zip(&quiet) {
                            *version += u64::from(!quiet);
                        }
                    }
                    Step::Lose(begins) => {
                        moments.lose(begins);
                        versions.iter_mut().for_each(|version| *version += 1);
                        // Before anything is told again of all this, all is looked at.
                        quiet = [true; 6];
                    }
                }
                for (moment, was) in checkpoints.values() {
                    let Some(told) = moments.since(1, *moment) else {
                        continue;
                    };
                    for number in 0..6 {
                        prop_assert!(was[number] == versions[number] || told.contains(&(number as u64)));
                    }
                }
            }
        }
    }

    #[test]
    fn only_what_came_later_is_told() {
        let mut moments = Moments::default();
        let first = moments.next();
        moments.rest();
        moments.pending.extend([(1, 10), (1, 11), (2, 12)]);
        moments.looked_at((1, 10));
        let second = moments.next();
        moments.rest();
        let told = |moments: &Moments, moment| {
            let mut told: Vec<u64> = moments.since(1, moment).unwrap().into_iter().collect();
            told.sort_unstable();
            told
        };
        assert_eq!(told(&moments, first), [10, 11]);
        assert_eq!(told(&moments, second), [11]);
        moments.lose(true);
        assert_eq!(moments.since(1, second), None);
        let third = moments.next();
        moments.rest();
        assert!(told(&moments, third).is_empty());
        moments.lose(false);
        let fourth = moments.next();
        moments.rest();
        assert_eq!(moments.since(1, fourth), None);
    }
}
