//! Users, groups and services by name, becoming another user, and sockets that systemd hands over: what the process is
//! on its machine. Names come from the files in /etc; directory services are not asked.

use std::os::fd::OwnedFd;

use anyhow::{Context, bail};
use nbd_server::{ClientRule, ClientRuleError};
use rustix::process::{Gid, PidfdFlags, PidfdGetfdFlags, Uid};

/// A user of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    /// The group that the user has at login, where it is known.
    pub(crate) gid: Option<u32>,
}

/// Finds a user by name or number.
pub(crate) fn user(name: &str) -> Option<User> {
    let lines = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let number: Option<u32> = name.parse().ok();
    for line in lines.lines() {
        let mut fields = line.split(':');
        let (found, _, uid, gid) = (fields.next(), fields.next(), fields.next(), fields.next());
        let uid: Option<u32> = uid.and_then(|uid| uid.parse().ok());
        if let Some(uid) = uid
            && (found == Some(name) || number == Some(uid))
        {
            return Some(User { uid, gid: gid.and_then(|gid| gid.parse().ok()) });
        }
    }
    number.map(|uid| User { uid, gid: None })
}

/// Finds a group by name or number.
pub(crate) fn group(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    groups(|found, _| found == name).into_iter().next()
}

/// The groups that a test takes, given their names and members.
fn groups(wanted: impl Fn(&str, &str) -> bool) -> Vec<u32> {
    let lines = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let mut found = Vec::new();
    for line in lines.lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(_), Some(gid), Some(members)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
            && let Ok(gid) = gid.parse()
            && wanted(name, members)
        {
            found.push(gid);
        }
    }
    found
}

/// Finds the port of a TCP service by its name.
pub(crate) fn service(name: &str) -> Option<u16> {
    let lines = std::fs::read_to_string("/etc/services").ok()?;
    lines.lines().find_map(|line| {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let (first, port) = (words.next()?, words.next()?);
        let port = port.strip_suffix("/tcp")?;
        let is_named = first == name || words.any(|alias| alias == name);
        if is_named { port.parse().ok() } else { None }
    })
}

/// Reads a rule on clients, with users by name, too.
pub(crate) fn client(text: &str) -> Result<ClientRule, String> {
    if let Some(name) = text.strip_prefix("uid:") {
        let user = user(name).ok_or_else(|| format!("there is no user {name:?}"))?;
        return Ok(ClientRule::Uid(user.uid));
    }
    text.parse().map_err(|error| match error {
        // The library knows no names of users.
        ClientRuleError::Unknown(_) => format!(
            "{text:?} is neither an address, a network ADDRESS/BITS, `unix`, uid:USER nor cid:NUMBER"
        ),
        error => error.to_string(),
    })
}

/// Becomes another user and group, for good. To be called while the process has one thread: the kernel changes no more.
pub(crate) fn become_user(name: Option<&str>, group_name: Option<&str>) -> anyhow::Result<()> {
    let user = match name {
        Some(name) => Some(user(name).with_context(|| format!("there is no user {name:?}"))?),
        None => None,
    };
    let gid = match group_name {
        Some(name) => Some(group(name).with_context(|| format!("there is no group {name:?}"))?),
        None => user.and_then(|user| user.gid),
    };
    if let Some(gid) = gid {
        let is_member = |members: &str| members.split(',').any(|member| Some(member) == name);
        let mut all = groups(|_, members| is_member(members));
        all.push(gid);
        let all: Vec<Gid> = all.into_iter().map(Gid::from_raw).collect();
        rustix::thread::set_thread_groups(&all).context("cannot leave the groups of this user")?;
        let gid = Gid::from_raw(gid);
        rustix::thread::set_thread_res_gid(gid, gid, gid)
            .with_context(|| format!("cannot become group {}", gid.as_raw()))?;
    } else if user.is_some() {
        bail!("the group of the user is not known; say group, too");
    }
    if let Some(user) = user {
        let uid = Uid::from_raw(user.uid);
        rustix::thread::set_thread_res_uid(uid, uid, uid)
            .with_context(|| format!("cannot become user {}", user.uid))?;
    }
    Ok(())
}

/// The first descriptor that systemd hands over.
const FIRST_DESCRIPTOR: i32 = 3;

/// How many sockets systemd hands over to this very process.
///
/// Source: sd_listen_fds(3).
fn socket_count() -> i32 {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    let is_ours =
        number("LISTEN_PID").is_some_and(|pid| u32::try_from(pid) == Ok(std::process::id()));
    if is_ours { number("LISTEN_FDS").unwrap_or(0).clamp(0, 1024) } else { 0 }
}

/// Whether systemd hands sockets over.
pub(crate) fn has_sockets() -> bool {
    socket_count() > 0
}

/// The sockets that systemd hands over, as descriptors of our own.
pub(crate) fn sockets() -> anyhow::Result<Vec<OwnedFd>> {
    let count = socket_count();
    if count == 0 {
        return Ok(Vec::new());
    }
    // A number is not a descriptor that is known to be open, or ours to close: the kernel is asked for a copy.
    let ourselves = rustix::process::getpid();
    let ourselves = rustix::process::pidfd_open(ourselves, PidfdFlags::empty())
        .context("cannot look at the sockets that systemd hands over")?;
    let mut sockets = Vec::new();
    for number in FIRST_DESCRIPTOR..FIRST_DESCRIPTOR + count {
        let socket = rustix::process::pidfd_getfd(&ourselves, number, PidfdGetfdFlags::empty());
        sockets
            .push(socket.with_context(|| format!("LISTEN_FDS: there is no descriptor {number}"))?);
    }
    Ok(sockets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine_are_found() {
        assert_eq!(user("root"), Some(User { uid: 0, gid: Some(0) }));
        assert_eq!(user("0"), user("root"));
        assert_eq!(user("4000000000").map(|user| user.gid), Some(None));
        assert_eq!(user("no such user"), None);
        assert_eq!((group("root"), group("77"), group("no such group")), (Some(0), Some(77), None));
        assert_eq!(client("uid:root"), Ok(ClientRule::Uid(0)));
        assert!(client("uid:no such user").unwrap_err().contains("no such user"));
        assert!(client("root").unwrap_err().contains("uid:USER"));
        assert!(client("1.2.3.4/33").unwrap_err().contains("32 bits"));
        assert_eq!(service("no such service"), None);
    }
}
