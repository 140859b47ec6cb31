//! Whether a group serves, as its engine finds.

use tokio::sync::watch;

/// What can be expected of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Serves,
    /// It has failed, for this reason, and is formed anew.
    Forms(String),
    /// It has failed for good, for this reason.
    Lost(String),
}

impl Health {
    /// Why it does not serve.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Serves => None,
            Self::Forms(reason) | Self::Lost(reason) => Some(reason),
        }
    }

    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost(_))
    }

    pub fn is_formed(&self) -> bool {
        matches!(self, Self::Forms(_))
    }
}

/// A group that is lost stays so, for the first reason.
pub(crate) fn set(health: &watch::Sender<Health>, now: Health) {
    health.send_if_modified(|known| {
        let changes = !known.is_lost() && *known != now;
        if changes {
            *known = now;
        }
        changes
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_stays_lost_for_the_first_reason() {
        let health = watch::Sender::new(Health::Serves);
        for now in [Health::Forms("a".into()), Health::Serves, Health::Lost("b".into())] {
            set(&health, now.clone());
            assert_eq!(*health.borrow(), now);
        }
        set(&health, Health::Serves);
        set(&health, Health::Lost("c".into()));
        assert_eq!(health.borrow().reason(), Some("b"));
    }
}
