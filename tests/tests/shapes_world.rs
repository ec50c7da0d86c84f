//! The shapes world: that its pictures show what their captions say, that the oracle sees it, and that nothing of the held-out
//! split is trained on.

use std::collections::{BTreeMap, BTreeSet};

use weights::world::{Category, Expression, Random, Split, WorldExample, example, expressions, sample_caption, see};

const SCENES: u64 = 1500;

fn examples(split: Option<Split>) -> impl Iterator<Item = WorldExample> {
    (0..SCENES).map(move |index| example(7, index, split))
}

#[test]
fn the_oracle_is_right_on_99_percent_of_true_scenes_and_of_hard_negatives() {
    let (mut fits, mut does_not, mut fits_its_own) = (0, 0, 0);
    for found in examples(None) {
        let (scene, other) = (see(&found.scene.draw()), see(&found.other_scene.draw()));
        fits += u64::from(found.caption.fits(&scene));
        does_not += u64::from(!found.caption.fits(&other) && !found.other_caption.fits(&scene));
        fits_its_own += u64::from(found.other_caption.fits(&other));
    }
    let least = SCENES * 99 / 100;
    assert!(
        fits >= least && does_not >= least && fits_its_own >= least,
        "{fits}, {does_not}, {fits_its_own} of {SCENES}"
    );
}

/// What a generator does wrong: objects that have grown together, are too many, too few, or of an unknown shape.
#[test]
fn the_oracle_refuses_what_a_caption_does_not_say() {
    let found = (0..).map(|i| example(3, i, None)).find(|e| e.caption.category() == Category::Count).unwrap();
    let mut scene = found.scene.clone();
    let first = scene.objects[0];
    scene.objects[1].x = first.x + first.radius * 1.2;
    scene.objects[1].y = first.y + first.radius * 0.3;
    assert!(!found.caption.fits(&see(&scene.draw())), "two that overlap are not two");
    let mut smeared = found.scene.draw();
    let rows = 3 * smeared.width as usize;
    let (upper, lower) = smeared.pixels.split_at_mut(32 * rows);
    upper.copy_from_slice(lower);
    assert!(!found.caption.fits(&see(&smeared)), "a picture cut in two");
}

#[test]
fn the_splits_share_no_caption_and_both_have_every_category() {
    let mut seen = BTreeMap::<String, Split>::new();
    for split in [Split::Train, Split::HeldOut] {
        let mut categories = BTreeSet::new();
        for found in examples(Some(split)) {
            for caption in [found.caption, found.other_caption] {
                categories.insert(caption.category());
                let before = seen.insert(caption.to_string(), split);
                assert!(before.is_none_or(|before| before == split), "\"{caption}\" is in both splits");
            }
        }
        assert_eq!(categories.len(), Category::ALL.len(), "{split}: {categories:?}");
    }
    let mut random = Random::new(2, 0);
    let mut held_out = BTreeMap::<Category, (f64, f64)>::new();
    for _ in 0..20_000 {
        let caption = sample_caption(&mut random);
        let (count, all) = held_out.entry(caption.category()).or_default();
        *count += f64::from(Split::of(&caption) == Split::HeldOut);
        *all += 1.;
    }
    for (category, (count, all)) in held_out {
        assert!((0.1..0.35).contains(&(count / all)), "{}: {:.2} are held out", category.name(), count / all);
    }
}

/// Every expression fits one object alone, and its box is where that object was drawn.
#[test]
fn expressions_speak_of_one_object() {
    let mut relational = 0;
    for found in examples(None).take(300) {
        let all = expressions(&found.scene);
        let texts: BTreeSet<&str> = all.iter().map(|e| e.text.as_str()).collect();
        assert_eq!(texts.len(), all.len(), "{}: {texts:?}", found.caption);
        let seen = see(&found.scene.draw());
        for Expression { text, bounding_box: [cx, cy, w, h] } in &all {
            relational += usize::from(["left", "right", "above", "below"].iter().any(|word| text.contains(word)));
            let centre = (f64::from(*cx) * 64., f64::from(*cy) * 64.);
            let near = |s: &&weights::world::Seen| {
                let kind = s.kind.expect("drawn");
                (s.centre.0 - centre.0).abs() < 1.5
                    && (s.centre.1 - centre.1).abs() < 1.5
                    && text.contains(kind.shape.name())
            };
            let object = seen.iter().find(near).unwrap_or_else(|| panic!("{text}: nothing of it at {centre:?}"));
            let area = f64::from(w * h) * 64. * 64.;
            assert!(object.area as f64 <= 1.2 * area, "{text}: a box of {area} around {} pixels", object.area);
        }
    }
    assert!(relational > 100, "{relational}");
}

#[test]
fn a_seed_and_a_number_make_the_same_scene() {
    let picture = |seed, index| example(seed, index, None).scene.draw();
    assert_eq!(picture(1, 2), picture(1, 2));
    assert_ne!(picture(1, 2), picture(1, 3));
    assert_ne!(picture(1, 2), picture(2, 2));
}
