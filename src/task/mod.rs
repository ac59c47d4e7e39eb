#![allow(missing_docs)]
use crate::freeze::Stopped;
use crate::kernel::ptrace;
use crate::outcome::{Difference, Refusal};
use crate::record::{Context, Kind};
use nix::unistd::Pid;
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Freeze(#[from] crate::freeze::Error),
    #[error(transparent)]
    Record(#[from] crate::record::Error),
}
type R<T> = Result<T, Error>;
pub fn prepare(_: &mut Stopped) -> R<()> {
    Ok(())
}
#[derive(serde::Serialize, serde::Deserialize, Clone)]
struct T {
    pid: i32,
    tid: i32,
    regs: Vec<u64>,
    mask: u64,
    x: Vec<u8>,
}
pub struct Recorded {
    t: Vec<T>,
}
impl Recorded {
    pub fn read(c: &Context) -> R<Self> {
        let mut t = vec![];
        for r in c.records_of(Kind::Thread) {
            t.push(r.json::<T>()?);
        }
        Ok(Self { t })
    }
    pub fn rseq_areas(&self) -> crate::memory::Ranges {
        let mut v = vec![];
        for t in &self.t {
            if let Ok(r) = ptrace::rseq(Pid::from_raw(t.tid)) {
                v.push(crate::memory::Span {
                    start: r.address,
                    end: r.address + 32,
                });
            }
        }
        v.into_iter().collect()
    }
}
pub fn capture(s: &mut Stopped, c: &mut Context) -> R<()> {
    for p in s.processes_mut() {
        let pid = p.pid.as_raw();
        for t in &mut p.threads {
            let mask = t.signal_mask()?;
            let r = *t.registers()?;
            let mut x = vec![0; 8192];
            let n = ptrace::xstate(t.tid, &mut x).unwrap();
            x.truncate(n);
            let regs = vec![
                r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx,
                r.rdx, r.rsi, r.rdi, r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base,
                r.gs_base, r.ds, r.es, r.fs, r.gs,
            ];
            let id = c.new_object();
            c.put_json(
                Kind::Thread,
                id,
                &T {
                    pid,
                    tid: t.tid.as_raw(),
                    regs,
                    mask,
                    x,
                },
            )?;
        }
    }
    Ok(())
}
pub fn check(_: &mut Stopped, _: &Recorded) -> R<()> {
    Ok(())
}
pub fn kill_born(_: &mut Stopped, _: &Recorded) -> R<usize> {
    Ok(0)
}
pub fn restore(s: &mut Stopped, rec: &Recorded) -> R<()> {
    for p in s.processes_mut() {
        for t in &mut p.threads {
            if let Some(k) = rec.t.iter().find(|k| k.tid == t.tid.as_raw()) {
                ptrace::set_xstate(t.tid, &k.x).unwrap();
                let g = &k.regs;
                let mut r = *t.registers()?;
                r.r15 = g[0];
                r.r14 = g[1];
                r.r13 = g[2];
                r.r12 = g[3];
                r.rbp = g[4];
                r.rbx = g[5];
                r.r11 = g[6];
                r.r10 = g[7];
                r.r9 = g[8];
                r.r8 = g[9];
                r.rax = g[10];
                r.rcx = g[11];
                r.rdx = g[12];
                r.rsi = g[13];
                r.rdi = g[14];
                r.orig_rax = g[15];
                r.rip = g[16];
                r.eflags = g[18];
                r.rsp = g[19];
                r.fs_base = g[21];
                r.gs_base = g[22];
                t.set_registers(&r);
                t.set_signal_mask(k.mask);
            }
        }
    }
    Ok(())
}
pub fn verify(_: &mut Stopped, _: &Recorded) -> R<Vec<Difference>> {
    Ok(vec![])
}
