//! Numbered places that are used again.

/// Things by number.
#[derive(Debug)]
pub(crate) struct Places<T> {
    places: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Places<T> {
    fn default() -> Places<T> {
        Places { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Places<T> {
    /// Takes a place.
    pub(crate) fn add(&mut self, thing: T) -> usize {
        let number = self.free.pop().unwrap_or(self.places.len());
        match self.places.get_mut(number) {
            Some(place) => *place = Some(thing),
            None => self.places.push(Some(thing)),
        }
        number
    }

    pub(crate) fn get(&self, number: usize) -> Option<&T> {
        self.places.get(number)?.as_ref()
    }

    /// Gives the place back.
    pub(crate) fn remove(&mut self, number: usize) -> Option<T> {
        let thing = self.places.get_mut(number)?.take();
        if thing.is_some() {
            self.free.push(number);
        }
        thing
    }

    /// All that there are.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.places.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_was_given_back_is_used_again() {
        let mut places = Places::default();
        assert_eq!([places.add('a'), places.add('b'), places.add('c')], [0, 1, 2]);
        assert_eq!((places.remove(1), places.remove(1), places.remove(9)), (Some('b'), None, None));
        assert_eq!((places.add('d'), places.get(1), places.get(9)), (1, Some(&'d'), None));
        assert_eq!(places.iter().collect::<String>(), "adc");
    }
}
