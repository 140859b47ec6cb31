//! What a client's word for a model means: a model's own name, an alias, or nothing said at all.

use crate::{RouterError, targets::Snapshot};
use proto::v1::Model;
use std::collections::{BTreeMap, BTreeSet};

/// Further names for models. An alias hides a model of the same name: the operator chose it.
pub(crate) struct Aliases(BTreeMap<String, String>);

impl Aliases {
    pub fn new(aliases: BTreeMap<String, String>) -> Self {
        Self(aliases)
    }

    /// The own name of the model that was asked for; of the only one where none was. Empty while
    /// no worker has joined. Errors: `Invalid` where none was named and there are several.
    pub fn model<'a>(&'a self, now: &'a Snapshot, asked: &'a str) -> Result<&'a str, RouterError> {
        if !asked.is_empty() {
            return Ok(self.0.get(asked).map_or(asked, String::as_str));
        }
        let present: BTreeSet<&str> = now.present().collect();
        // Where every worker is away, the models that they served are still asked for.
        let known = match present.is_empty() {
            true => now.names().collect(),
            false => present,
        };
        match known.len() {
            0 | 1 => Ok(known.first().copied().unwrap_or_default()),
            _ => {
                let message =
                    format!("model is missing and several are served; name one of {}", join(known));
                Err(RouterError::invalid("model", message))
            }
        }
    }

    /// Every name that may be asked for, for people.
    pub fn names(&self, now: &Snapshot) -> String {
        join(now.names().chain(self.0.keys().map(String::as_str)).collect())
    }

    /// The models that are served, and after them their aliases.
    pub fn listed(&self, mut served: Vec<Model>) -> Vec<Model> {
        let find = |own: &String| served.iter().find(|model| model.id == *own);
        let named = |(alias, own): (&String, &String)| {
            Some(Model { id: alias.clone(), root: own.clone(), ..find(own)?.clone() })
        };
        let aliases: Vec<Model> = self.0.iter().filter_map(named).collect();
        served.retain(|model| !self.0.contains_key(&model.id));
        served.extend(aliases);
        served
    }
}

fn join(names: BTreeSet<&str>) -> String {
    names.into_iter().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(id: &str, root: &str) -> Model {
        Model { id: id.into(), root: root.into(), context_max: 8, workers: 1, created: 3 }
    }

    #[test]
    fn aliases_are_listed_after_what_is_served_and_only_with_it() {
        let pairs = [("gpt-4", "qwen"), ("old", "gone"), ("small", "tiny")];
        let aliases =
            Aliases::new(pairs.map(|(alias, own)| (alias.to_owned(), own.to_owned())).into());
        let listed = aliases.listed(vec![model("qwen", ""), model("tiny", "")]);
        let wanted = [("qwen", ""), ("tiny", ""), ("gpt-4", "qwen"), ("small", "tiny")];
        assert_eq!(listed, wanted.map(|(id, root)| model(id, root)));
        let hidden = aliases.listed(vec![model("small", ""), model("tiny", "")]);
        assert_eq!(hidden, [model("tiny", ""), model("small", "tiny")]);
    }
}
