//! What madvise(2) and mlock(2) have set on VMAs.
//!
//! `/proc/PID/maps` does not show it, and `smaps`, which does, walks all page tables: too slow for a rollback. So it is
//! read once from the shadow, which never changes, and set again at every rollback; what is set already costs a check.

use nix::unistd::Pid;

use crate::freeze::Batch;
use crate::kernel::maps::Vma;
use crate::kernel::{procfs, smaps};

use super::Result;
use super::layout::Layout;
use super::locks::{self, LOCKED, Locked, ON_FAULT};
use super::ranges::Span;
use super::source::Source;
use super::space::system;

/// Whether two lists say the same of what can be put back.
pub(super) fn same(one: &[Advised], other: &[Advised]) -> bool {
    let kept = |advised: &Advised| -> Vec<&'static str> {
        let flags = advised.flags.iter().copied();
        flags
            .filter(|flag| {
                SHOWN.contains(flag)
                    || SETTABLE
                        .iter()
                        .any(|s| s.flag == *flag && s.clear.is_some())
            })
            .collect()
    };
    let mut addresses: Vec<u64> = one
        .iter()
        .chain(other)
        .map(|advised| advised.span.start)
        .collect();
    addresses.sort_unstable();
    let at = |list: &[Advised], address: u64| {
        list.iter()
            .find(|advised| advised.span.start <= address && address < advised.span.end)
            .map(kept)
    };
    addresses
        .iter()
        .all(|address| at(one, *address) == at(other, *address))
}

/// A flag of a VMA, the advice that sets it, and the one that clears it.
struct Settable {
    flag: &'static str,
    set: i32,
    clear: Option<i32>,
}

const SETTABLE: [Settable; 8] = [
    Settable {
        flag: "dc",
        set: libc::MADV_DONTFORK,
        clear: Some(libc::MADV_DOFORK),
    },
    Settable {
        flag: "wf",
        set: libc::MADV_WIPEONFORK,
        clear: Some(libc::MADV_KEEPONFORK),
    },
    Settable {
        flag: "dd",
        set: libc::MADV_DONTDUMP,
        clear: Some(libc::MADV_DODUMP),
    },
    Settable {
        flag: "mg",
        set: libc::MADV_MERGEABLE,
        clear: Some(libc::MADV_UNMERGEABLE),
    },
    Settable {
        flag: "sr",
        set: libc::MADV_SEQUENTIAL,
        clear: Some(libc::MADV_NORMAL),
    },
    Settable {
        flag: "rr",
        set: libc::MADV_RANDOM,
        clear: None,
    },
    // There is no way back from these to neither of them.
    Settable {
        flag: "hg",
        set: libc::MADV_HUGEPAGE,
        clear: None,
    },
    Settable {
        flag: "nh",
        set: libc::MADV_NOHUGEPAGE,
        clear: None,
    },
];

/// Flags that no advice sets: locked in RAM, locked when touched, sealed (mseal(2)).
const SHOWN: [&str; 3] = [LOCKED, ON_FAULT, "sl"];

/// Neighbouring VMAs, all private or all shared, with the same flags out of those this file is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advised {
    /// Where they are.
    pub span: Span,
    /// The flags that are set, as `smaps` names them.
    pub flags: Vec<&'static str>,
}

/// Reads what was set on the VMAs of a layout. What is not in the shadow was not to be forked.
pub(super) fn read(source: &Source, layout: &Layout, locked: &[Locked]) -> Result<Vec<Advised>> {
    let of_shadow = smaps::parse(&source.smaps()?);
    let find = |vma: &Vma| {
        of_shadow
            .iter()
            .find(|flags| flags.start <= vma.start && vma.start < flags.end)
    };
    let locked = |vma: &Vma| {
        let holds =
            |locked: &&Locked| locked.span.start <= vma.start && vma.start < locked.span.end;
        locked.iter().find(holds)
    };
    Ok(join(layout, |vma| {
        let mut flags = find(vma).map_or_else(|| vec!["dc"], flags_of);
        if let Some(locked) = locked(vma) {
            flags.push(LOCKED);
            flags.extend((locked.on_fault != 0).then_some(ON_FAULT));
        }
        flags
    }))
}

/// The flags of a live address space, with its VMAs cut as in `layout`.
pub(super) fn live(pid: Pid, layout: &Layout) -> Result<Vec<Advised>> {
    let flags = read_flags(pid)?;
    Ok(join(layout, |vma| {
        let found = flags
            .iter()
            .find(|flags| flags.start <= vma.start && vma.start < flags.end);
        found.map_or_else(Vec::new, flags_of)
    }))
}

fn read_flags(pid: Pid) -> Result<Vec<smaps::Flags>> {
    let text = std::fs::read(procfs::path(pid, "smaps"))
        .map_err(|error| system(pid, "read its memory flags", error))?;
    Ok(smaps::parse(&String::from_utf8_lossy(&text)))
}

fn flags_of(flags: &smaps::Flags) -> Vec<&'static str> {
    let names = SETTABLE.iter().map(|settable| settable.flag).chain(SHOWN);
    names.filter(|name| flags.has(name)).collect()
}

fn join(layout: &Layout, flags: impl Fn(&Vma) -> Vec<&'static str>) -> Vec<Advised> {
    let mut found: Vec<Advised> = Vec::new();
    let mut was_shared = false;
    for vma in layout.vmas.iter().filter(|vma| !vma.is_special()) {
        let flags = flags(vma);
        match found.last_mut() {
            Some(last)
                if last.span.end == vma.start
                    && last.flags == flags
                    && was_shared == vma.shared =>
            {
                last.span.end = vma.end
            }
            _ => found.push(Advised {
                span: Span::from(vma),
                flags,
            }),
        }
        was_shared = vma.shared;
    }
    found
}

impl Advised {
    /// Whether it is locked in RAM.
    pub(super) fn is_locked(&self) -> bool {
        self.flags.contains(&LOCKED)
    }

    /// Adds the steps that set what was set and clear what was not; locks too, if any of the address space were locked.
    ///
    /// Kinds of memory that know nothing of an advice refuse it, so the results do not matter.
    pub(super) fn apply(&self, batch: &mut Batch, has_locks: bool) {
        let span = self.span;
        let mut advise = |advice: i32| {
            batch.call(
                libc::SYS_madvise,
                &[span.start.into(), span.len().into(), advice.into()],
            );
        };
        let is_set = |flag: &str| self.flags.contains(&flag);
        for settable in SETTABLE.iter().filter(|settable| !is_set(settable.flag)) {
            settable.clear.into_iter().for_each(&mut advise);
        }
        for settable in SETTABLE.iter().filter(|settable| is_set(settable.flag)) {
            advise(settable.set);
        }
        if has_locks {
            locks::restore(batch, span, self.is_locked(), is_set(ON_FAULT));
        }
    }

    /// Most steps that [`Advised::apply`] adds.
    pub(super) const STEPS: usize = 16;
}
