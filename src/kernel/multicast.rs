//! Multicast memberships of sockets (RFC 3678): which there are can only be asked for one group after the other.
#![allow(unsafe_code)]

use std::mem::offset_of;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::socket::set_option;

/// A group on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Membership {
    /// Index of the interface.
    pub interface: u32,
    /// Address of the group.
    pub group: IpAddr,
}

/// `struct group_req`.
#[repr(C)]
struct Request {
    interface: u32,
    group: libc::sockaddr_storage,
}
const _: () = assert!(size_of::<Request>() == 136 && offset_of!(Request, group) == 8);

/// `struct group_filter` with room for one source.
#[repr(C)]
struct Filter {
    interface: u32,
    group: libc::sockaddr_storage,
    mode: u32,
    sources: u32,
    source: libc::sockaddr_storage,
}
const _: () = assert!(size_of::<Filter>() == 272);

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_LEAVE_GROUP: i32 = 45;
const MCAST_MSFILTER: i32 = 48;

impl Membership {
    fn level(&self) -> i32 {
        match self.group {
            IpAddr::V4(_) => libc::IPPROTO_IP,
            IpAddr::V6(_) => libc::IPPROTO_IPV6,
        }
    }

    fn address(&self) -> libc::sockaddr_storage {
        // SAFETY: all-zero is a valid sockaddr_storage.
        let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        match self.group {
            IpAddr::V4(group) => {
                let address = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: 0,
                    sin_addr: libc::in_addr {
                        s_addr: u32::from_ne_bytes(group.octets()),
                    },
                    sin_zero: [0; 8],
                };
                // SAFETY: a sockaddr_storage has room and alignment for every socket address.
                unsafe {
                    (&raw mut storage)
                        .cast::<libc::sockaddr_in>()
                        .write(address)
                };
            }
            IpAddr::V6(group) => {
                let address = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: 0,
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr {
                        s6_addr: group.octets(),
                    },
                    sin6_scope_id: 0,
                };
                // SAFETY: as above.
                unsafe {
                    (&raw mut storage)
                        .cast::<libc::sockaddr_in6>()
                        .write(address)
                };
            }
        }
        storage
    }

    /// Whether a socket has it.
    pub fn is_of(&self, fd: BorrowedFd<'_>) -> nix::Result<bool> {
        let mut filter = Filter {
            interface: self.interface,
            group: self.address(),
            mode: 0,
            sources: 0,
            // SAFETY: all-zero is a valid sockaddr_storage.
            source: unsafe { std::mem::zeroed() },
        };
        let mut length = size_of::<Filter>() as libc::socklen_t;
        // SAFETY: the kernel writes within `filter`, whose size it is told.
        let result = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                self.level(),
                MCAST_MSFILTER,
                (&raw mut filter).cast(),
                &raw mut length,
            )
        };
        match Errno::result(result) {
            Ok(_) => Ok(true),
            Err(Errno::EADDRNOTAVAIL | Errno::EINVAL | Errno::ENOPROTOOPT | Errno::ENODEV) => {
                Ok(false)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Has a socket join or leave.
    pub fn set(&self, fd: BorrowedFd<'_>, join: bool) -> nix::Result<()> {
        let request = Request {
            interface: self.interface,
            group: self.address(),
        };
        let name = if join {
            MCAST_JOIN_GROUP
        } else {
            MCAST_LEAVE_GROUP
        };
        // SAFETY: `request` is plain data and outlives the slice; its padding lies between two fields that are zeroed or
        // written, and the kernel does not look at it.
        let bytes = unsafe {
            std::slice::from_raw_parts((&raw const request).cast::<u8>(), size_of::<Request>())
        };
        set_option(fd, self.level(), name, bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_socket_joins_and_leaves() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let membership = Membership {
            interface: 1,
            group: IpAddr::V4(Ipv4Addr::new(239, 9, 8, 7)),
        };
        for join in [true, false] {
            membership.set(socket.as_fd(), join).unwrap();
            assert_eq!(membership.is_of(socket.as_fd()), Ok(join));
        }
    }
}
