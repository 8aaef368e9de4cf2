//! A test on the real CIFAR-100, if `PFQ_DATA` names its folder.

use datasets::{DataSource, Error, Event, load};

#[test]
fn the_real_data_are_read_correctly() {
    let Some(folder) = std::env::var_os("PFQ_DATA").filter(|folder| !folder.is_empty()) else {
        eprintln!("skipped: PFQ_DATA is not set");
        return;
    };
    let mut events = Vec::new();
    let data = match load(&DataSource::Folder(folder.into()), &mut |event| events.push(event)) {
        Err(error @ Error::NoData { .. }) => {
            eprintln!("skipped: {error}");
            return;
        }
        data => data.unwrap(),
    };
    assert!(!events.iter().any(|event| matches!(event, Event::Unverified { .. })), "{events:?}");
    assert_eq!(
        (data.name.as_str(), data.classes, data.train.len(), data.test.len()),
        ("cifar100", 100, 50_000, 10_000)
    );
    for (images, per_class) in [(&data.train, 500), (&data.test, 100)] {
        let mut counts = [0; 100];
        images.labels.iter().for_each(|&label| counts[usize::from(label)] += 1);
        assert_eq!(counts, [per_class; 100]);
    }
    // Many publications give these values.
    for (found, known) in [(data.mean, [0.5071, 0.4865, 0.4409]), (data.std, [0.2673, 0.2564, 0.2762])] {
        assert!(
            found.iter().zip(known).all(|(found, known): (&f32, f32)| (found - known).abs() < 1e-4),
            "{found:?}"
        );
    }
    // The first training picture shows cattle, and the first test picture a mountain.
    assert_eq!((data.train.labels[0], data.test.labels[0]), (19, 49));

    // Adjacent pixels of a picture are similar, unless rows, columns or channels are mixed up.
    let image = |i: usize| data.train.image(i);
    let (mut along, mut across) = (0u64, 0u64);
    for i in (0..data.train.len()).step_by(97) {
        for p in (0..32 * 31 * 3).step_by(7) {
            along += u64::from(image(i)[p].abs_diff(image(i)[p + 32 * 3]));
            across += u64::from(image(i)[p].abs_diff(image(i + 1)[p]));
        }
    }
    assert!(3 * along < across, "{along} {across}");
}
