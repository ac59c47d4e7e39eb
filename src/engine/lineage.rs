//! Which checkpoint came from which. Pure.

use std::collections::BTreeMap;

/// A tree, or several, of checkpoints, named by numbers.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    parents: BTreeMap<u64, Option<u64>>,
    /// What the live tree was equal to last.
    current: Option<u64>,
    last: u64,
}

impl Lineage {
    /// A checkpoint was taken; returns its number.
    pub(super) fn grow(&mut self) -> u64 {
        self.last += 1;
        self.parents.insert(self.last, self.current);
        self.current = Some(self.last);
        self.last
    }

    /// The live tree was rolled back to one.
    pub(super) fn go(&mut self, to: u64) {
        self.current = Some(to);
    }

    /// One is released: what came from it comes from its parent now.
    pub(super) fn drop(&mut self, number: u64) {
        let parent = self.parents.remove(&number).flatten();
        let children = self.parents.values_mut().chain([&mut self.current]);
        for of in children.filter(|of| **of == Some(number)) {
            *of = parent;
        }
    }

    /// The parent of one, if it has one.
    pub(super) fn parent(&self, of: u64) -> Option<u64> {
        self.parents.get(&of).copied().flatten()
    }

    /// What the live tree was equal to last, or that which this came from.
    pub(super) fn current(&self) -> Option<u64> {
        self.current
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn branches_and_what_is_left_of_them() {
        let mut lineage = Lineage::default();
        let [a, b, c] = [(); 3].map(|()| lineage.grow());
        lineage.go(b);
        let d = lineage.grow();
        assert_eq!(
            [a, b, c, d].map(|of| lineage.parent(of)),
            [None, Some(a), Some(b), Some(b)]
        );
        lineage.drop(b);
        assert_eq!(
            [a, c, d].map(|of| lineage.parent(of)),
            [None, Some(a), Some(a)]
        );
        lineage.drop(d);
        assert_eq!(lineage.current(), Some(a));
        lineage.drop(a);
        assert_eq!((lineage.parent(c), lineage.current()), (None, None));
    }

    proptest! {
        /// Whoever is left has the nearest ancestor that is left for a parent.
        #[test]
        fn a_parent_is_the_nearest_ancestor(acts in proptest::collection::vec((0u8..3, any::<usize>()), 0..60)) {
            let mut lineage = Lineage::default();
            let (mut born_of, mut alive) = (BTreeMap::new(), Vec::new());
            let mut at = None;
            for (act, which) in acts {
                let chosen = alive.get(which % alive.len().max(1)).copied();
                match (act, chosen) {
                    (0, _) => {
                        let number = lineage.grow();
                        born_of.insert(number, at);
                        alive.push(number);
                        at = Some(number);
                    }
                    (1, Some(to)) => {
                        lineage.go(to);
                        at = Some(to);
                    }
                    (_, Some(gone)) => {
                        lineage.drop(gone);
                        alive.retain(|number| *number != gone);
                    }
                    _ => {}
                }
                let nearest = |mut of: Option<u64>| {
                    while let Some(number) = of && !alive.contains(&number) {
                        of = born_of[&number];
                    }
                    of
                };
                for number in &alive {
                    prop_assert_eq!(lineage.parent(*number), nearest(born_of[number]));
                }
                prop_assert_eq!(lineage.current(), nearest(at));
            }
        }
    }
}
