//! Dropping privileges: what the service needs root for ends when its listeners are registered.

use nix::unistd::{Gid, Group, Uid, User, setgroups, setresgid, setresuid};
use std::ffi::CString;
use std::str::FromStr;

/// A user to become: `NAME`, `UID`, `NAME:GROUP` or `UID:GID`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user id.
    pub uid: Uid,
    /// The group id.
    pub gid: Gid,
    /// The user's name, if it has one: its supplementary groups are taken on too, unless a group
    /// was given.
    name: Option<String>,
}

/// Why privileges could not be dropped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrivilegeError {
    /// The system refused one of the steps. The process may be half changed: it must end.
    #[error("becoming user {uid}: {step}: {source}")]
    Refused {
        /// The user id that was to be taken on.
        uid: Uid,
        /// What was refused.
        step: &'static str,
        /// What the system said.
        source: nix::Error,
    },
    /// The process could become root again. It must end.
    #[error("becoming user {uid}: privileges can be regained")]
    Regained {
        /// The user id that was to be taken on.
        uid: Uid,
    },
}

impl Identity {
    /// Becomes this user, for good and in all threads, and gives up gaining privileges by running
    /// programs. Does nothing if the process is this user already.
    ///
    /// # Errors
    /// When the system refuses; usually the process is not root.
    pub fn assume(&self) -> Result<(), PrivilegeError> {
        let uid = self.uid;
        let refused = |step| move |source| PrivilegeError::Refused { uid, step, source };
        if Uid::current() != self.uid || Gid::current() != self.gid {
            match &self.name {
                Some(name) => nix::unistd::initgroups(&c_string(name), self.gid),
                None => setgroups(&[self.gid]),
            }
            .map_err(refused("setting the groups"))?;
            setresgid(self.gid, self.gid, self.gid).map_err(refused("setting the group"))?;
            setresuid(self.uid, self.uid, self.uid).map_err(refused("setting the user"))?;
            if !self.uid.is_root() && setresuid(Uid::from_raw(0), self.uid, self.uid).is_ok() {
                return Err(PrivilegeError::Regained { uid });
            }
        }
        // Threads that are made later inherit it; at this time there is none else.
        rustix::thread::set_no_new_privs(true).map_err(|e| {
            refused("giving up new privileges")(nix::Error::from_raw(e.raw_os_error()))
        })
    }
}

fn c_string(name: &str) -> CString {
    // A name from the user database has no zero byte; one with it would name nobody.
    CString::new(name).unwrap_or_default()
}

impl FromStr for Identity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let entry = match user.parse() {
            Ok(uid) => User::from_uid(Uid::from_raw(uid)),
            Err(_) => User::from_name(user),
        }
        .map_err(|error| format!("looking up the user {user:?}: {error}"))?;
        let uid = match (&entry, user.parse()) {
            (Some(entry), _) => entry.uid,
            (None, Ok(uid)) => Uid::from_raw(uid),
            (None, Err(_)) => return Err(format!("there is no user {user:?}")),
        };
        let gid = match (group, &entry) {
            (Some(group), _) => group_id(group)?,
            (None, Some(entry)) => entry.gid,
            (None, None) => {
                return Err(format!("user {user} has no entry; give a group too: {user}:GID"));
            }
        };
        let name = entry.filter(|_| group.is_none()).map(|entry| entry.name);
        Ok(Self { uid, gid, name })
    }
}

fn group_id(group: &str) -> Result<Gid, String> {
    if let Ok(gid) = group.parse() {
        return Ok(Gid::from_raw(gid));
    }
    Group::from_name(group)
        .map_err(|error| format!("looking up the group {group:?}: {error}"))?
        .map(|entry| entry.gid)
        .ok_or_else(|| format!("there is no group {group:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_names_and_numbers() {
        let root: Identity = "root".parse().unwrap();
        assert_eq!((root.uid.as_raw(), root.gid.as_raw()), (0, 0));
        assert_eq!(root.name.as_deref(), Some("root"));
        assert_eq!("0".parse::<Identity>().unwrap(), root);

        let numbers: Identity = "3999999:3999998".parse().unwrap();
        assert_eq!((numbers.uid.as_raw(), numbers.gid.as_raw()), (3_999_999, 3_999_998));
        assert_eq!(numbers.name, None);

        // With a group given, the user's own groups are not taken on.
        assert_eq!("root:3".parse::<Identity>().unwrap().name, None);
    }

    #[test]
    fn identities_that_cannot_be_are_refused_in_words() {
        for (text, reason) in [
            ("no-such-user-here", "there is no user"),
            ("root:no-such-group-here", "there is no group"),
            ("3999999", "give a group too"),
            ("-1", "there is no user"),
            ("", "there is no user"),
        ] {
            let message = text.parse::<Identity>().unwrap_err();
            assert!(message.contains(reason), "{text:?}: {message}");
        }
    }
}
