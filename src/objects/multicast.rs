//! Multicast memberships. A socket can only be asked about one group after the other, so those that anybody in its network
//! namespace has are asked for; mostly there are none.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;

use crate::kernel::multicast::Membership;

/// The groups that sockets of a process's network namespace may have joined. Those that every interface is in are left out.
pub(super) fn groups_of(pid: i32) -> BTreeSet<Membership> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/net/{name}"));
    // Without IPv6 there is no such file.
    let mut groups = parse(&read("igmp").unwrap_or_default());
    groups.extend(parse_six(&read("igmp6").unwrap_or_default()));
    groups
}

/// `/proc/net/igmp`: a line per interface that begins with its index, and below it a line per group.
fn parse(text: &str) -> BTreeSet<Membership> {
    let mut groups = BTreeSet::new();
    let mut interface = 0;
    for line in text.lines().skip(1) {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if !line.starts_with([' ', '\t']) {
            interface = first.parse().unwrap_or(0);
            continue;
        }
        let Ok(group) = u32::from_str_radix(first, 16) else {
            continue;
        };
        let group = Ipv4Addr::from(group.to_ne_bytes());
        if group != Ipv4Addr::new(224, 0, 0, 1) {
            groups.insert(Membership {
                interface,
                group: IpAddr::V4(group),
            });
        }
    }
    groups
}

/// `/proc/net/igmp6`: index, name, group in 32 digits …
fn parse_six(text: &str) -> BTreeSet<Membership> {
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let interface = words.next()?.parse().ok()?;
        let group = u128::from_str_radix(words.nth(1)?, 16).ok()?;
        let group = Ipv6Addr::from(group);
        // All nodes, and those that belong to an address of the interface.
        let segments = group.segments();
        let is_own = segments[1..7] == [0; 6] && segments[7] == 1
            || segments[5..] == [0, 1, 0xff00]
            || segments[5] == 1 && segments[6] & 0xff00 == 0xff00;
        (!is_own).then_some(Membership {
            interface,
            group: IpAddr::V6(group),
        })
    };
    text.lines().filter_map(parse).collect()
}

/// Those of these that a socket has; it may have more that it had before.
pub(super) fn memberships(
    fd: BorrowedFd<'_>,
    family: i32,
    candidates: &BTreeSet<Membership>,
) -> nix::Result<Vec<Membership>> {
    let mut found = Vec::new();
    for candidate in candidates {
        if (family == libc::AF_INET6 || candidate.group.is_ipv4()) && candidate.is_of(fd)? {
            found.push(*candidate);
        }
    }
    Ok(found)
}

/// Has a socket be member of these groups and no others.
pub(super) fn set(
    fd: BorrowedFd<'_>,
    wanted: &[Membership],
    now: &[Membership],
) -> nix::Result<()> {
    for extra in now.iter().filter(|one| !wanted.contains(one)) {
        extra.set(fd, false)?;
    }
    for missing in wanted.iter().filter(|one| !now.contains(one)) {
        missing.set(fd, true)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_groups_that_were_joined_count() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     2      V3\n\
                    \t\t\t\t030201EF     1 0:00000000\t\t0\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let group = IpAddr::V4(Ipv4Addr::new(239, 1, 2, 3));
        let interface = 1;
        assert_eq!(
            parse(text),
            BTreeSet::from([Membership { interface, group }])
        );
        let text = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n\
                    2    eth0            ff0200000000000000000001ff123456     1 00000004 0\n\
                    2    eth0            ff0200000000000000000000000000fb     1 00000004 0\n";
        let group = "ff02::fb".parse().unwrap();
        let interface = 2;
        assert_eq!(
            parse_six(text),
            BTreeSet::from([Membership { interface, group }])
        );
    }
}
