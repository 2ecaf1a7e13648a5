//! Whether writes carry births, looked up once for each view: writes ask for each of theirs.

use crate::view::View;
use std::sync::{Arc, Weak};

/// What the last view said that was asked. As long as this knows it, a change makes another one of it: a view is not
/// changed in place while anybody refers to it.
#[derive(Debug, Default)]
pub(super) struct Dated {
    by: Weak<View>,
    dates: bool,
}

impl Dated {
    /// See [`View::dates_writes`].
    pub(super) fn by(&mut self, view: &Arc<View>) -> bool {
        if !std::ptr::eq(self.by.as_ptr(), Arc::as_ptr(view)) {
            *self = Dated { by: Arc::downgrade(view), dates: view.dates_writes() };
        }
        self.dates
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::records::NodeRecord;
    use serde_json::json;

    #[test]
    fn births_end_with_the_view_in_which_a_node_of_an_older_program_is_live() {
        let (mut view, mut dated) = (Arc::new(View::default()), Dated::default());
        assert!(dated.by(&view) && dated.by(&view));
        for (version, dates) in [("0.2.0", false), ("0.3.0", true), ("0.2.1", false)] {
            let record: NodeRecord = serde_json::from_value(json!({
                "node": "n1", "instance": uuid::Uuid::nil(), "addr": "127.0.0.1:1", "status": "up",
                "since": "2026-01-01T00:00:00Z", "version": version,
            }))
            .unwrap();
            Arc::make_mut(&mut view).nodes.insert("n1".into(), (1, record));
            assert_eq!((dated.by(&view), dated.by(&view)), (dates, dates), "{version}");
        }
    }
}
