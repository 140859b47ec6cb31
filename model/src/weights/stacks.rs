//! The weights of a shard without their numbers: what a device is asked to hold.

use kernels::PartShape;

use super::{
    Checkpoint, Seeded, Source,
    module::{Cut, Module},
};
use crate::{ModelError, Shard};

/// Matrices that are one weight on a device, stacked by rows, without their numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    pub role: Role,
    pub parts: Vec<PartShape>,
}

/// What a stack is to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A weight of its own.
    Weight,
    /// What is looked up, makes logits or chooses experts: devices that round weights further
    /// leave it as it is.
    Table,
    /// One of a layer's experts, which lie together and alike: parts are said to be integers only
    /// where all experts' are, in the same groups.
    Expert,
}

impl Checkpoint {
    /// What `shard` holds, weight by weight, tables first, without reading it.
    ///
    /// # Errors
    /// The files cannot be read; a shard of another model.
    pub fn stacks(&self, shard: &Shard) -> Result<Vec<Stack>, ModelError> {
        let tables = self.modules().tables(shard).into_iter();
        let mut stacks = self.shapes(tables.map(|cut| (Role::Table, vec![cut])).collect())?;
        for layer in 0..self.config.layers {
            stacks.append(&mut self.layer_stacks(layer, shard)?);
        }
        Ok(stacks)
    }

    /// What each expert of a layer consists of, where it has some: gate and up, then down.
    ///
    /// # Errors
    /// As [`Self::stacks`].
    pub(crate) fn expert_stacks(
        &self,
        layer: usize,
        shard: &Shard,
    ) -> Result<Option<[Vec<PartShape>; 2]>, ModelError> {
        let stacks = self.layer_stacks(layer, shard)?.into_iter();
        let mut of_experts = stacks.filter(|stack| stack.role == Role::Expert);
        let both = of_experts.next().zip(of_experts.next());
        Ok(both.map(|(gate_up, down)| [gate_up.parts, down.parts]))
    }

    fn layer_stacks(&self, layer: usize, shard: &Shard) -> Result<Vec<Stack>, ModelError> {
        let mut stacks = self.shapes(self.modules().layer(layer, shard))?;
        make_alike(&mut stacks);
        Ok(stacks)
    }

    fn shapes(&self, stacks: Vec<(Role, Vec<(Module, Cut)>)>) -> Result<Vec<Stack>, ModelError> {
        let shape = |(module, cut): &(Module, Cut)| match &self.source {
            Source::Files { .. } => self.files()?.shape(module, cut),
            Source::Outline(numbers) | Source::Seeded(Seeded { numbers, .. }) => {
                Ok(numbers.shape(module, cut, &self.names))
            }
        };
        let stack = |(role, cuts): (Role, Vec<(Module, Cut)>)| {
            let parts = cuts.iter().map(shape);
            Ok(Stack { role, parts: parts.collect::<Result<_, ModelError>>()? })
        };
        stacks.into_iter().map(stack).collect()
    }
}

/// Takes what experts of a layer do not have in common for no integers: gates and ups, and downs.
fn make_alike(stacks: &mut [Stack]) {
    let of_experts = stacks.iter_mut().filter(|stack| stack.role == Role::Expert);
    let (gate_ups, downs): (Vec<_>, Vec<_>) =
        of_experts.enumerate().partition(|(at, _)| at.is_multiple_of(2));
    for mut alike in [gate_ups, downs] {
        let differ = alike.windows(2).any(|pair| pair[0].1.parts != pair[1].1.parts);
        for part in alike.iter_mut().flat_map(|(_, stack)| &mut stack.parts) {
            part.integers = part.integers.take().filter(|_| !differ);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::{Groups, IntegerShape};

    #[test]
    fn experts_that_are_stored_differently_are_said_to_be_no_integers() {
        let part = |size| {
            let groups = Groups::Runs { size, first: 0 };
            let integers = Some(IntegerShape { bits: 4, groups, count: 256 / size });
            vec![PartShape { rows: 64, cols: 256, integers }]
        };
        let stack = |role, parts| Stack { role, parts };
        let expert = |size| stack(Role::Expert, part(size));
        // A weight, then gate and up, and down, of two experts.
        let mut stacks =
            vec![stack(Role::Weight, part(128)), expert(64), expert(32), expert(64), expert(128)];
        make_alike(&mut stacks);
        let numbers = vec![PartShape::numbers(64, 256)];
        let of = |at: usize| &stacks[at].parts;
        assert_eq!((of(0), of(1), of(3)), (&part(128), &part(64), &part(64)));
        assert_eq!((of(2), of(4)), (&numbers, &numbers));
    }
}
