//! What must be done to an address space to make it equal to an image. Pure.

use crate::kernel::maps::Vma;
use crate::kernel::pagemap::Categories;
use crate::outcome::Refusal;

use super::image::AddressSpaceHeader;
use super::layout::{Layout, LayoutChange};
use super::observe::Observed;
use super::ranges::{Ranges, Span};
use super::space::for_each_part;

/// The changes, to be made in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Changes of the VMA list.
    pub layout: Vec<LayoutChange>,
    /// The program break to set, if the VMA list changes.
    pub brk: Option<u64>,
    /// Guards to remove, and guards to set.
    pub unguard: Ranges,
    /// See `unguard`.
    pub guard: Ranges,
    /// Pages that were not there.
    pub drop: Ranges,
    /// Pages to be copied back.
    pub copy: Ranges,
    /// Pages that are not armed and will be there, page cache included.
    pub arm: Ranges,
    /// VMAs that are not registered for tracking.
    pub register: Vec<Span>,
    /// All that is to be copied is of a process that was made again: too much for the page store.
    pub remade: bool,
}

/// What the image says, as the plan needs it.
#[derive(Debug, Clone, Copy)]
pub struct Recorded<'a> {
    /// The fixed part.
    pub header: &'a AddressSpaceHeader,
    /// Its VMAs.
    pub layout: &'a Layout,
    /// Its populated pages.
    pub populated: &'a Ranges,
    /// Its guards.
    pub guards: &'a Ranges,
    /// Pages that may differ though they were not written since armed last.
    pub stale: &'a Ranges,
}

/// Plans the changes that make the address space equal to the image.
///
/// A page needs no copy only if all of this holds: it is where it was in a VMA that was not replaced, it is in
/// memory (or, if no file is behind it, swapped out), it is anonymous, its write-protection is still armed, and it is not
/// stale.
pub fn plan(recorded: Recorded<'_>, observed: &Observed) -> Result<Plan, Refusal> {
    let live = observed.layout.as_ref().unwrap_or(recorded.layout);
    let layout = match &observed.layout {
        None => Vec::new(),
        Some(live) => recorded.layout.changes_from(live),
    };
    if let Some(special) = special_change(&layout, live) {
        return Err(Refusal {
            object: format!("memory {special:?}"),
            holder: format!("pid {}", recorded.header.pid),
            remedy:
                "the program has moved or unmapped the kernel's own mapping since the checkpoint"
                    .into(),
        });
    }
    let replaced = replaced(&layout);
    let seen = sort(live, observed);
    let suspect = seen.suspect_in(recorded.layout);
    let private: Ranges = recorded.layout.private().map(Span::from).collect();
    let copy = recorded
        .populated
        .intersection(&suspect.union(&replaced).union(recorded.stale));
    // What another checkpoint has armed is not suspect, but is it in this one?
    let drop = seen
        .there
        .union(&seen.there_in_files)
        .union(&recorded.stale.intersection(&private))
        .difference(&replaced)
        .difference(recorded.populated);
    let arm = copy.union(&seen.cache.difference(&replaced).difference(&drop));
    let guards = seen.guards.difference(&replaced);
    let to_register = seen.unregistered.union(&replaced);
    let mut register: Vec<Span> = recorded.layout.private().map(Span::from).collect();
    register.retain(|span| to_register.touches(*span));
    let brk = observed
        .layout
        .as_ref()
        .map(|_| recorded.header.brk)
        .filter(|brk| observed.brk != Some(*brk));
    Ok(Plan {
        layout,
        brk,
        unguard: guards.difference(recorded.guards),
        guard: recorded.guards.difference(&guards),
        drop,
        copy,
        arm,
        register,
        remade: false,
    })
}

/// Where changes put other memory.
pub(super) fn replaced(changes: &[LayoutChange]) -> Ranges {
    let replaced = changes.iter().filter_map(|change| match change {
        LayoutChange::Unmap(span) => Some(*span),
        LayoutChange::Map(vma) => Some(Span::from(vma)),
        LayoutChange::Protect(..) => None,
    });
    replaced.collect()
}

/// Sorts what was seen of pages by what it means.
pub(super) fn sort(live: &Layout, observed: &Observed) -> Seen {
    let mut seen = Seen::default();
    for_each_part(live, &observed.suspect, |vma, span, categories| {
        seen.take(vma, span, categories);
    });
    for_each_part(live, &observed.of_files, |vma, span, categories| {
        if vma.is_anonymous() {
            return;
        }
        if is_clean_in_file(categories) {
            seen.clean_in_files.push(span);
        }
        if categories.is_populated() {
            seen.there_in_files.push(span);
        }
    });
    seen
}

/// What the pages are that were seen.
#[derive(Default)]
pub(super) struct Seen {
    /// Anonymous memory that may have changed.
    suspect: Ranges,
    /// Anonymous memory that is there and suspect.
    there: Ranges,
    /// Anonymous memory that is not there.
    holes: Ranges,
    /// The program's own pages of files' VMAs that are there.
    there_in_files: Ranges,
    /// Those of them that have not changed.
    clean_in_files: Ranges,
    /// Page cache.
    cache: Ranges,
    pub(super) guards: Ranges,
    /// What can't be tracked yet.
    pub(super) unregistered: Ranges,
}

impl Seen {
    /// Pages of the private VMAs of a layout that may have changed, those of files among them that were not looked at.
    pub(super) fn suspect_in(&self, layout: &Layout) -> Ranges {
        let files = layout.private().filter(|vma| !vma.is_anonymous());
        let files: Ranges = files.map(Span::from).collect();
        self.suspect.union(&files.difference(&self.clean_in_files))
    }

    /// The program's own pages, in the layout that was looked at.
    pub(super) fn populated(&self, layout: &Layout) -> Ranges {
        let anonymous = layout.private().filter(|vma| vma.is_anonymous());
        let anonymous: Ranges = anonymous.map(Span::from).collect();
        anonymous
            .difference(&self.holes)
            .union(&self.there_in_files)
    }

    fn take(&mut self, vma: &Vma, span: Span, categories: Categories) {
        if !categories.has(Categories::WP_ALLOWED) {
            self.unregistered.push(span);
        }
        if categories.has(Categories::GUARD) {
            self.guards.push(span);
        }
        if !vma.is_anonymous() {
            if categories.has(Categories::PRESENT) {
                self.cache.push(span);
            }
            return;
        }
        if !is_swapped(categories) {
            self.suspect.push(span);
        }
        match categories.is_populated() {
            true => self.there.push(span),
            false => self.holes.push(span),
        }
    }
}

/// Swapped out and still armed. In a file's VMA a page that was dropped leaves a marker that looks like one.
fn is_swapped(categories: Categories) -> bool {
    categories.has(Categories::WP_ALLOWED | Categories::SWAPPED)
        && !categories.has(Categories::WRITTEN)
        && !categories.has(Categories::GUARD)
}

fn is_clean_in_file(categories: Categories) -> bool {
    categories.has(Categories::WP_ALLOWED | Categories::PRESENT)
        && !categories.has(Categories::WRITTEN)
}

/// A change that touches one of the kernel's own mappings.
fn special_change<'c>(changes: &'c [LayoutChange], live: &'c Layout) -> Option<&'c Vma> {
    changes.iter().find_map(|change| match change {
        LayoutChange::Map(vma) => Some(vma).filter(|vma| vma.is_special()),
        LayoutChange::Unmap(span) | LayoutChange::Protect(span, _) => {
            live.at(span.start).filter(|vma| vma.is_special())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::pagemap::Region;
    use crate::memory::PAGE;

    const ARMED: Categories = Categories(1 | 8);
    const DIRTY: Categories = Categories(1 | 2 | 8);
    const MARKER: Categories = Categories(1 | 16);
    const HOLE: Categories = Categories(1);
    const NEW: Categories = Categories(2 | 8);

    fn header() -> AddressSpaceHeader {
        AddressSpaceHeader {
            pid: 1,
            shadow: 2,
            brk: 0x9000,
            window_start: 0,
            window_end: 0,
            locks_future: 0,
        }
    }

    fn vma(start: u64, end: u64, inode: u64) -> Vma {
        Vma {
            start: start * PAGE,
            end: end * PAGE,
            prot: 3,
            shared: false,
            offset: 0,
            device: inode,
            inode,
            name: Box::default(),
        }
    }

    fn pages(spans: &[(u64, u64)]) -> Ranges {
        spans
            .iter()
            .map(|(start, end)| Span {
                start: start * PAGE,
                end: end * PAGE,
            })
            .collect()
    }

    /// What a scan reports where these pages are there and all else is holes; armed pages are not among it.
    fn regions(of: &[(u64, u64, Categories)]) -> Vec<Region> {
        let mut with_holes = Vec::new();
        let mut at = 0;
        for (start, end, categories) in of {
            with_holes.push((at, *start, HOLE));
            with_holes.push((*start, *end, *categories));
            at = *end;
        }
        with_holes.push((at, 32, HOLE));
        with_holes
            .iter()
            .filter(|(start, end, categories)| start < end && *categories != ARMED)
            .map(|(start, end, categories)| Region {
                start: start * PAGE,
                end: end * PAGE,
                categories: *categories,
            })
            .collect()
    }

    fn planned(was: Layout, populated: &Ranges, stale: &Ranges, observed: &Observed) -> Plan {
        let recorded = Recorded {
            header: &header(),
            layout: &was,
            populated,
            guards: &Ranges::new(),
            stale,
        };
        plan(recorded, observed).unwrap()
    }

    #[test]
    fn only_what_was_written_is_copied() {
        let was = Layout {
            vmas: vec![vma(0, 20, 0)],
            ..Layout::default()
        };
        let observed = Observed {
            suspect: regions(&[(0, 3, ARMED), (3, 4, DIRTY), (4, 8, ARMED), (12, 14, DIRTY)]),
            ..Observed::default()
        };
        // Page 9 was there and has been dropped since; pages 12 and 13 were not there.
        let plan = planned(
            was,
            &pages(&[(0, 8), (9, 10)]),
            &pages(&[(6, 7)]),
            &observed,
        );
        assert_eq!(plan.copy, pages(&[(3, 4), (6, 7), (9, 10)]));
        assert_eq!(plan.drop, pages(&[(12, 14)]));
        assert!(plan.layout.is_empty() && plan.register.is_empty() && plan.brk.is_none());
    }

    #[test]
    fn a_marker_in_a_files_vma_is_not_a_clean_page() {
        let was = Layout {
            vmas: vec![vma(0, 4, 7), vma(4, 8, 0)],
            ..Layout::default()
        };
        let observed = Observed {
            suspect: regions(&[(0, 8, MARKER)]),
            of_files: regions(&[(0, 4, MARKER)]),
            ..Observed::default()
        };
        let plan = planned(was, &pages(&[(0, 8)]), &Ranges::new(), &observed);
        assert_eq!(plan.copy, pages(&[(0, 4)]));
    }

    #[test]
    fn a_page_that_shows_the_file_again_is_not_clean() {
        let was = Layout {
            vmas: vec![vma(0, 8, 7)],
            ..Layout::default()
        };
        let armed = Region {
            start: PAGE,
            end: 2 * PAGE,
            categories: ARMED,
        };
        // All of it is there and armed; only page 1 is anonymous.
        let observed = Observed {
            of_files: vec![armed],
            ..Observed::default()
        };
        let plan = planned(was, &pages(&[(0, 2)]), &Ranges::new(), &observed);
        assert_eq!(plan.copy, pages(&[(0, 1)]));
        assert!(plan.drop.is_empty());
    }

    #[test]
    fn what_was_mapped_anew_at_the_same_place_is_not_trusted() {
        let was = Layout {
            vmas: vec![vma(0, 8, 0)],
            ..Layout::default()
        };
        let observed = Observed {
            suspect: regions(&[(0, 2, NEW), (2, 8, ARMED)]),
            ..Observed::default()
        };
        let plan = planned(was, &pages(&[(1, 8)]), &Ranges::new(), &observed);
        assert_eq!(plan.copy, pages(&[(1, 2)]));
        assert_eq!(plan.drop, pages(&[(0, 1)]));
        assert_eq!(
            plan.register,
            [Span {
                start: 0,
                end: 8 * PAGE
            }]
        );
    }

    #[test]
    fn a_page_of_a_later_checkpoint_is_dropped() {
        let was = Layout {
            vmas: vec![vma(0, 8, 0)],
            ..Layout::default()
        };
        let observed = Observed {
            suspect: regions(&[(0, 3, ARMED)]),
            ..Observed::default()
        };
        // Page 2 came with the later one, which armed it; page 9 was in a VMA that is not in this one.
        let stale = pages(&[(1, 3), (9, 10)]);
        let plan = planned(was, &pages(&[(0, 2)]), &stale, &observed);
        assert_eq!(plan.copy, pages(&[(1, 2)]));
        assert_eq!(plan.drop, pages(&[(2, 3)]));
    }

    #[test]
    fn a_vma_that_is_gone_comes_back_with_its_pages() {
        let was = Layout {
            vmas: vec![vma(0, 4, 0), vma(6, 8, 0)],
            ..Layout::default()
        };
        let live = Layout {
            vmas: vec![vma(0, 5, 0)],
            ..Layout::default()
        };
        let observed = Observed {
            layout: Some(live),
            brk: Some(1),
            suspect: regions(&[(0, 4, ARMED), (4, 5, NEW)]),
            of_files: Vec::new(),
        };
        let plan = planned(was, &pages(&[(0, 4), (6, 7)]), &Ranges::new(), &observed);
        assert_eq!(plan.copy, pages(&[(6, 7)]));
        assert!(plan.drop.is_empty());
        assert_eq!(plan.brk, Some(0x9000));
        assert_eq!(plan.layout.len(), 2);
    }

    #[test]
    fn the_kernels_own_mappings_are_left_alone() {
        let special = Vma {
            name: b"[vdso]"[..].into(),
            ..vma(4, 6, 0)
        };
        let was = Layout {
            vmas: vec![vma(0, 4, 0), special],
            ..Layout::default()
        };
        let observed = Observed {
            layout: Some(Layout {
                vmas: vec![vma(0, 4, 0)],
                ..Layout::default()
            }),
            ..Observed::default()
        };
        let recorded = Recorded {
            header: &header(),
            layout: &was,
            populated: &Ranges::new(),
            guards: &Ranges::new(),
            stale: &Ranges::new(),
        };
        assert!(
            plan(recorded, &observed)
                .unwrap_err()
                .object
                .contains("[vdso]")
        );
    }
}
