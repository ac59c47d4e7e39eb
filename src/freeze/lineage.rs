//! Who descends from whom, from births alone.
//!
//! A process belongs to the tree from its birth, by its parent, and whatever becomes of that parent. Its PID passes to
//! another process only by another birth, so the last birth of a PID decides. Ends decide nothing: the end of a first
//! thread is not always that of the process (threads may outlive it; execve(2) of another thread takes its PID), and the
//! kernel tells it after the PID may have been given away. They are a hint at what to look for in order to forget it.

use std::collections::BTreeSet;

use nix::unistd::Pid;

use crate::kernel::proc_events::Event;

/// The PIDs of processes that descend from the root, some of which have ended.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    known: BTreeSet<Pid>,
    /// Those of them that have probably ended.
    ended: BTreeSet<Pid>,
}

impl Lineage {
    /// Takes note of the next event.
    pub(super) fn note(&mut self, event: Event) {
        match event {
            Event::Born { parent, child } => {
                self.ended.remove(&child);
                if self.known.contains(&parent) {
                    self.known.insert(child);
                } else {
                    self.known.remove(&child);
                }
            }
            Event::Ended(pid) => {
                if self.known.contains(&pid) {
                    self.ended.insert(pid);
                }
            }
        }
    }

    /// Forgets those that have ended and have been reaped. To be called when all births of processes that `is_there` can
    /// see to be gone have been noted.
    pub(super) fn forget_ended(&mut self, is_there: impl Fn(Pid) -> bool) {
        let known = &mut self.known;
        self.ended.retain(|pid| {
            let there = is_there(*pid);
            if !there {
                known.remove(pid);
            }
            there
        });
    }

    /// Replaces all that is known: these are the processes of the tree.
    pub(super) fn set(&mut self, pids: impl Iterator<Item = Pid>) {
        self.known = pids.collect();
        self.ended.clear();
    }

    /// Adds a process.
    pub(super) fn add(&mut self, pid: Pid) {
        self.known.insert(pid);
        self.ended.remove(&pid);
    }

    /// Whether a PID is that of a descendant.
    pub(super) fn contains(&self, pid: Pid) -> bool {
        self.known.contains(&pid)
    }

    /// The PIDs that are known.
    pub(super) fn pids(&self) -> impl Iterator<Item = Pid> {
        self.known.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// What may happen to the processes of a machine with few PIDs. Numbers choose among those that it may happen to.
    #[derive(Debug, Clone)]
    enum Step {
        Fork(usize),
        /// The first thread ends; the process may go on by others.
        LeaderEnds(usize),
        /// The process ends; its children are adopted by the init.
        Exit(usize),
        Reap(usize),
        /// The kernel tells an end only now.
        TellEnd(usize),
        Sweep,
        Stop,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => any::<usize>().prop_map(Step::Fork),
            1 => any::<usize>().prop_map(Step::LeaderEnds),
            3 => any::<usize>().prop_map(Step::Exit),
            3 => any::<usize>().prop_map(Step::Reap),
            3 => any::<usize>().prop_map(Step::TellEnd),
            1 => Just(Step::Sweep),
            1 => Just(Step::Stop),
        ];
        prop::collection::vec(step, 0..200)
    }

    #[derive(Debug)]
    struct Process {
        is_ours: bool,
        is_zombie: bool,
    }

    const PIDS: i32 = 12;
    const ROOT: i32 = 2;

    /// PID 1 is the init, 2 the root of the tree, 3 a stranger.
    #[derive(Debug)]
    struct Machine {
        processes: BTreeMap<i32, Process>,
        untold_ends: Vec<i32>,
    }

    impl Machine {
        fn new() -> Self {
            let process = |pid| {
                let is_ours = pid == ROOT;
                (
                    pid,
                    Process {
                        is_ours,
                        is_zombie: false,
                    },
                )
            };
            Self {
                processes: (1..=3).map(process).collect(),
                untold_ends: Vec::new(),
            }
        }

        fn choose(&self, number: usize, zombies: bool) -> Option<i32> {
            let pids: Vec<i32> = self
                .processes
                .iter()
                .filter(|(_, process)| process.is_zombie == zombies)
                .map(|(pid, _)| *pid)
                .collect();
            (!pids.is_empty()).then(|| pids[number % pids.len()])
        }

        fn ours(&self, with_zombies: bool) -> BTreeSet<Pid> {
            self.processes
                .iter()
                .filter(|(_, process)| process.is_ours && (with_zombies || !process.is_zombie))
                .map(|(pid, _)| Pid::from_raw(*pid))
                .collect()
        }

        fn step(&mut self, step: &Step, lineage: &mut Lineage) {
            match step {
                Step::Fork(number) => {
                    let free = (1..=PIDS).find(|pid| !self.processes.contains_key(pid));
                    let (Some(parent), Some(child)) = (self.choose(*number, false), free) else {
                        return;
                    };
                    let is_ours = self.processes[&parent].is_ours;
                    self.processes.insert(
                        child,
                        Process {
                            is_ours,
                            is_zombie: false,
                        },
                    );
                    lineage.note(Event::Born {
                        parent: Pid::from_raw(parent),
                        child: Pid::from_raw(child),
                    });
                }
                Step::LeaderEnds(number) => {
                    let Some(pid) = self.choose(*number, false) else {
                        return;
                    };
                    lineage.note(Event::Ended(Pid::from_raw(pid)));
                }
                Step::Exit(number) => match self.choose(*number, false) {
                    Some(pid) if pid > ROOT => {
                        self.untold_ends.push(pid);
                        self.processes
                            .get_mut(&pid)
                            .into_iter()
                            .for_each(|process| process.is_zombie = true);
                    }
                    _ => {}
                },
                Step::Reap(number) => {
                    if let Some(pid) = self.choose(*number, true) {
                        self.processes.remove(&pid);
                    }
                }
                Step::TellEnd(number) => {
                    if !self.untold_ends.is_empty() {
                        let which = number % self.untold_ends.len();
                        let pid = self.untold_ends.swap_remove(which);
                        lineage.note(Event::Ended(Pid::from_raw(pid)));
                    }
                }
                Step::Sweep => {
                    lineage.forget_ended(|pid| self.processes.contains_key(&pid.as_raw()));
                }
                Step::Stop => lineage.set(self.ours(false).into_iter()),
            }
        }
    }

    proptest! {
        /// All descendants are known, whoever has adopted them; what else is known has ended.
        #[test]
        fn the_living_are_exact(steps in steps()) {
            let mut machine = Machine::new();
            let mut lineage = Lineage::default();
            lineage.set([Pid::from_raw(ROOT)].into_iter());
            for step in &steps {
                machine.step(step, &mut lineage);
                let living: BTreeSet<Pid> = lineage
                    .pids()
                    .filter(|pid| machine.processes.get(&pid.as_raw()).is_some_and(|process| !process.is_zombie))
                    .collect();
                prop_assert_eq!(&living, &machine.ours(false));
                prop_assert!(lineage.ended.is_subset(&lineage.known));
            }
            // All ends told and looked at: nothing is left of those that were reaped.
            while !machine.untold_ends.is_empty() {
                machine.step(&Step::TellEnd(0), &mut lineage);
            }
            machine.step(&Step::Sweep, &mut lineage);
            let known: BTreeSet<Pid> = lineage.pids().collect();
            prop_assert!(known.is_subset(&machine.ours(true)), "{:?} {:?}", known, machine);
        }
    }

    #[test]
    fn an_orphan_stays_and_a_stranger_with_its_pid_does_not() {
        let pid = Pid::from_raw;
        let mut lineage = Lineage::default();
        lineage.set([pid(2)].into_iter());
        for (parent, child) in [(2, 3), (3, 4)] {
            lineage.note(Event::Born {
                parent: pid(parent),
                child: pid(child),
            });
        }
        lineage.note(Event::Ended(pid(3)));
        lineage.forget_ended(|there| there != pid(3));
        assert!(!lineage.contains(pid(3)));
        assert!(lineage.contains(pid(4)));
        lineage.note(Event::Born {
            parent: pid(1),
            child: pid(4),
        });
        assert!(!lineage.contains(pid(4)));
    }
}
