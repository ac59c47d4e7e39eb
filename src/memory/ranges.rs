//! Sets of addresses as sorted, disjoint ranges.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::kernel::maps::Vma;
use crate::kernel::pagemap::Region;

/// Addresses `[start, end)`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Span {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
}

impl Span {
    /// All addresses that a program can have.
    pub const ALL: Self = Self {
        start: 0,
        end: super::USER_END,
    };

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }
}

impl From<&Vma> for Span {
    fn from(vma: &Vma) -> Self {
        Self {
            start: vma.start,
            end: vma.end,
        }
    }
}

impl From<&Region> for Span {
    fn from(region: &Region) -> Self {
        Self {
            start: region.start,
            end: region.end,
        }
    }
}

/// A set of addresses: spans in order, disjoint, none empty, no two adjacent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Span>);

impl Ranges {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a span; cheapest if it begins at or after the end of all the set holds.
    pub fn push(&mut self, span: Span) {
        if span.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.end == span.start => last.end = span.end,
            Some(last) if last.end > span.start => {
                let merged = std::mem::take(self).union(&Self(vec![span]));
                *self = merged;
            }
            _ => self.0.push(span),
        }
    }

    /// The spans in order.
    pub fn spans(&self) -> &[Span] {
        &self.0
    }

    /// The spans in order, cut so that none is longer than `most` bytes.
    pub fn pieces(&self, most: u64) -> impl Iterator<Item = Span> {
        self.0.iter().flat_map(move |span| {
            let end = span.end;
            (span.start..end)
                .step_by(most as usize)
                .map(move |start| Span {
                    start,
                    end: end.min(start + most),
                })
        })
    }

    /// The set with all gaps of at most `most` bytes filled.
    pub fn bridged(&self, most: u64) -> Self {
        let mut spans: Vec<Span> = Vec::with_capacity(self.0.len());
        for span in &self.0 {
            match spans.last_mut() {
                Some(last) if span.start - last.end <= most => last.end = span.end,
                _ => spans.push(*span),
            }
        }
        Self(spans)
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: u64) -> bool {
        let index = self.0.partition_point(|span| span.end <= address);
        self.0.get(index).is_some_and(|span| span.start <= address)
    }

    /// Whether any address of a span is in it.
    pub fn touches(&self, span: Span) -> bool {
        let index = self.0.partition_point(|held| held.end <= span.start);
        self.0.get(index).is_some_and(|held| held.start < span.end)
    }

    /// What of a span is in it, in order.
    pub fn within(&self, span: Span) -> impl Iterator<Item = Span> {
        let first = self.0.partition_point(|held| held.end <= span.start);
        let held = self.0[first..].iter();
        held.take_while(move |held| held.start < span.end)
            .map(move |held| Span {
                start: held.start.max(span.start),
                end: held.end.min(span.end),
            })
    }

    /// Number of bytes in it.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(Span::len).sum()
    }

    /// Number of 4 KiB pages in it.
    pub fn pages(&self) -> u64 {
        self.bytes() / super::PAGE
    }

    /// What is in either.
    pub fn union(&self, other: &Self) -> Self {
        let (mut ours, mut theirs) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut spans: Vec<Span> = Vec::with_capacity(self.0.len() + other.0.len());
        loop {
            let span = match (ours.peek(), theirs.peek()) {
                (Some(one), Some(two)) if one.start <= two.start => ours.next(),
                (_, Some(_)) => theirs.next(),
                (_, None) => ours.next(),
            };
            let Some(span) = span else {
                return Self(spans);
            };
            match spans.last_mut() {
                Some(last) if last.end >= span.start => last.end = last.end.max(span.end),
                _ => spans.push(*span),
            }
        }
    }

    /// What is in both.
    pub fn intersection(&self, other: &Self) -> Self {
        let (mut i, mut j) = (0, 0);
        let mut spans = Vec::new();
        while let (Some(one), Some(two)) = (self.0.get(i), other.0.get(j)) {
            let span = Span {
                start: one.start.max(two.start),
                end: one.end.min(two.end),
            };
            if !span.is_empty() {
                spans.push(span);
            }
            if one.end < two.end {
                i += 1;
            } else {
                j += 1;
            }
        }
        Self(spans)
    }

    /// What is in this and not in the other.
    pub fn difference(&self, other: &Self) -> Self {
        let mut spans = Vec::with_capacity(self.0.len());
        let mut rest = other.0.iter().peekable();
        for span in &self.0 {
            let mut at = span.start;
            while rest.next_if(|cut| cut.end <= at).is_some() {}
            while let Some(cut) = rest.peek().filter(|cut| cut.start < span.end) {
                if cut.start > at {
                    spans.push(Span {
                        start: at,
                        end: cut.start,
                    });
                }
                at = cut.end;
                // One that reaches further cuts the next span too.
                if cut.end >= span.end {
                    break;
                }
                rest.next();
            }
            if at < span.end {
                spans.push(Span {
                    start: at,
                    end: span.end,
                });
            }
        }
        Self(spans)
    }
}

impl FromIterator<Span> for Ranges {
    fn from_iter<I: IntoIterator<Item = Span>>(spans: I) -> Self {
        let mut ranges = Self::new();
        spans.into_iter().for_each(|span| ranges.push(span));
        ranges
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn model(ranges: &Ranges) -> BTreeSet<u64> {
        ranges
            .spans()
            .iter()
            .flat_map(|span| span.start..span.end)
            .collect()
    }

    fn ranges() -> impl Strategy<Value = Ranges> {
        proptest::collection::vec((0u64..60, 1u64..8), 0..12).prop_map(|spans| {
            spans
                .into_iter()
                .map(|(start, len)| Span {
                    start,
                    end: start + len,
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn set_algebra(a in ranges(), b in ranges()) {
            prop_assert_eq!(model(&a.union(&b)), &model(&a) | &model(&b));
            prop_assert_eq!(model(&a.intersection(&b)), &model(&a) & &model(&b));
            prop_assert_eq!(model(&a.difference(&b)), &model(&a) - &model(&b));
            for span in b.spans() {
                let within: Ranges = a.within(*span).collect();
                prop_assert_eq!(within, a.intersection(&Ranges::from_iter([*span])));
            }
            let touches = b.spans().iter().any(|span| a.touches(*span));
            prop_assert_eq!(touches, !model(&a).is_disjoint(&model(&b)));
        }

        #[test]
        fn pieces_are_short_and_all_there_is(a in ranges(), most in 1u64..9) {
            prop_assert!(a.pieces(most).all(|piece| !piece.is_empty() && piece.len() <= most));
            prop_assert_eq!(a.pieces(most).collect::<Ranges>(), a);
        }

        #[test]
        fn bridges_span_short_gaps_only(a in ranges(), most in 0u64..9) {
            let bridged = a.bridged(most);
            prop_assert!(a.difference(&bridged).is_empty());
            prop_assert!(bridged.spans().windows(2).all(|pair| pair[1].start - pair[0].end > most));
            prop_assert!(bridged.difference(&a).spans().iter().all(|gap| gap.len() <= most));
        }

        #[test]
        fn spans_are_in_order_and_apart(a in ranges(), b in ranges()) {
            for set in [&a, &a.union(&b), &a.difference(&b)] {
                prop_assert!(set.spans().iter().all(|span| !span.is_empty()));
                prop_assert!(set.spans().windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }
}
