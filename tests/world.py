"""A small world: short videos under the names and lists of every dataset. A stage takes seconds.

Every frame shows its number as a bar code, so that a test can read which frames came back. Every
video has clicks in its sound: moments of interaction.
"""

import itertools
import json
import os
from fractions import Fraction

import av
import numpy as np

ITEMS, SECONDS, FPS = 13, 8.4, 15                             # videos of each split
BITS = 11                                                     # 1, eight of the number, parity, 0
X264 = {"preset": "veryfast", "crf": "20"}
MPEG4 = {"qmin": "2", "qmax": "4"}
AUDIO = {"strict": "experimental", "aac_pns": "0"}            # no noise made up by AAC's decoder


def paint(number, width=64, height=48, video=0):
    """Frame of a video, (H, W, 3) uint8: a bar code above moving waves."""
    code = np.array([1, *(number >> i & 1 for i in range(8)), number.bit_count() & 1, 0])
    x, y = np.arange(width), np.arange(height)[:, None]
    waves = [np.sin((x * (1 + video % 3) + (3 + video) * number) / (7 + c))
             * np.cos((y + (video - 3) * number) / (5 + c)) for c in range(3)]
    image = 128 + 90 * np.stack(waves, -1)
    image[:height // 2] = (30 + 195 * code[x * BITS // width])[None, :, None]
    return image.astype(np.uint8)


def number_of(image):
    """The number that a frame (H, W, 3) shows, -1 if its bar code cannot be read."""
    height, width = image.shape[:2]
    row = image[height // 8:3 * height // 8].astype(float).mean((0, 2))
    centers = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    levels = np.array([row[max(0, k - 1):k + 2].mean() for k in centers])
    code = (levels > 128).astype(int)
    clear = abs(levels - 128).min() >= 25 and code[0] == 1 and code[-1] == 0
    return int(code[1:9] @ 2 ** np.arange(8)) if clear and code[1:9].sum() % 2 == code[9] else -1


def write_video(path, images, fps=25, codec="libx264", options=X264, gop=25, bf=0,
                pix_fmt="yuv420p", times=None, sound=None, edit=None, mux=None):
    """Write frames (H, W, 3) uint8, and sound if there is any.   -> path

    gop: frames from one key frame to the next. bf: B-frames between two others.
    times: seconds of each frame, if they are uneven. sound: (codec, rate, layout, samples).
    edit: changes the list of packets. mux: container options.
    """
    images, fps = list(images), Fraction(1000 if times else fps)
    times = [round(1000 * t) for t in times] if times else range(len(images))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(f"file:{path}", "w", container_options=mux or {}) as c:
        v = c.add_stream(codec, rate=fps, options=options)
        v.height, v.width = images[0].shape[:2]
        v.pix_fmt, v.codec_context.thread_count = pix_fmt, 1
        v.codec_context.gop_size, v.codec_context.max_b_frames = gop, bf
        v.codec_context.time_base = 1 / fps
        a = c.add_stream(*sound[:2], layout=sound[2], options=AUDIO) if sound else None
        packets = []
        for k, image in zip(times, images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = k, 1 / fps
            packets += v.encode(frame)
        packets += v.encode(None) + (encode_sound(a, sound[3]) if sound else [])
        packets = edit(packets) if edit else packets
        for p in sorted(packets, key=lambda p: p.dts * p.time_base):
            c.mux(p)
    if codec == "libsvtav1":                                  # makes root's process real-time
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def encode_sound(stream, samples):
    """Packets of the samples (channels, n) float32 in -1 .. 1."""
    context = stream.codec_context
    context.open()
    pieces = av.AudioResampler(format=context.format, layout=context.layout, rate=stream.rate,
                               frame_size=context.frame_size or 1024)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", context.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = stream.rate, 0, Fraction(1, stream.rate)
    return [p for f in [*pieces.resample(frame), *pieces.resample(None), None]
            for p in stream.encode(f)]


def clicks(video, rate=16000):
    """Three loud clicks in quiet noise, (1, n) float32."""
    rng = np.random.default_rng(video)
    x = 0.002 * rng.normal(size=(1, round(SECONDS * rate)))
    for t in 1.5 + 0.15 * video + np.arange(3) * (1.3 + 0.05 * video):
        click = 0.6 * rng.uniform(-1, 1, 120) * np.exp(-np.arange(120) / 40)
        x[:, round(t * rate):][:, :120] += click
    return x.astype(np.float32)


def make(root):
    """Write ROOT/videos and the datasets, whose videos are links to them.   -> root"""
    for k in range(ITEMS):
        frames = [paint(t, video=k) for t in range(round(SECONDS * FPS))]
        write_video(root / f"videos/{k}.mp4", frames, FPS, gop=FPS, bf=2,
                    sound=("aac", 16000, "mono", clicks(k)))
        write_video(root / f"videos/{k}.avi", frames, FPS, "mpeg4", MPEG4, gop=12)
    for dataset in (epic, ego4d, ucf101, hmdb51, oops, kinetics400, charades, multithumos):
        dataset(root / dataset.__name__)
    return root


def link(folder, k, *names):
    """FOLDER/NAME of each name is the video k."""
    for path in (folder / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder.parent / f"videos/{k}{path.suffix.lower()}", path)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def epic(folder):
    for p, split in enumerate(("train", "validation", "test_timestamps"), 1):
        text(folder / f"annotations/EPIC_100_{split}.csv",
             "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,verb_class,"
             "noun_class", *(f"P0{p}_{k:02d}_0,P0{p},P0{p}_{k:02d},00:00:0{1.5 + k / 4:.2f},"
                             f"00:00:0{3 + k / 4:.2f},{k},{2 * k}" for k in range(ITEMS)))
        for k in range(ITEMS):
            link(folder, k, f"videos/P0{p}/P0{p}_{k:02d}.mp4")
    text(folder / "annotations/EPIC_100_tail_verbs.csv", "verb", 3, 4)
    text(folder / "annotations/EPIC_100_tail_nouns.csv", "noun", 2)
    text(folder / "annotations/EPIC_100_unseen_participant_ids_validation.csv", "participant_id",
         "P02")


def ego4d(folder):
    def span(name, start, stop):                              # frame numbers count 30 per second
        return {f"{name}_start_sec": start, f"{name}_end_sec": stop,
                f"{name}_start_frame": round(30 * start), f"{name}_end_frame": round(30 * stop)}

    for split in ("train", "val", "test_unannotated"):
        actions, changes, labelled = [], [], split != "test_unannotated"
        for k in range(ITEMS):
            video, clip = f"video-{split}{k}", f"clip-{split}{k}"
            ids = {"video_uid": video, "clip_uid": clip}
            link(folder, k, f"videos/{video}.mp4", f"clips/{clip}.mp4")
            if split == "train":
                link(folder, k, f"{clip}.mp4")                # to pre-train on
            for i in range(25):
                labels = {"verb_label": (k + i) % 5, "noun_label": (k * i) % 7}
                actions.append({**ids, "action_idx": i, **(labels if labelled else {}),
                                **span("action_clip", 0.2 * i, 0.2 * i + 2)})
            labels = {"state_change": k % 2 == 0, "pnr_frame": None}
            labels |= {"parent_pnr_frame": 40 + 15 * k} if k % 2 == 0 else {}
            changes.append({**ids, "unique_id": f"id-{split}{k}", **(labels if labelled else {}),
                            **span("parent", 0.05 * k, 7.5 + 0.05 * k)})
        for task, rows in (("lta", actions), ("oscc-pnr", changes)):
            text(folder / f"annotations/fho_{task}_{split}.json", json.dumps({"clips": rows}))
    text(folder / "annotations/fho_lta_taxonomy.json", json.dumps(
        {"verbs": [f"v{i}" for i in range(5)], "nouns": [f"n{i}" for i in range(7)]}))


def ucf101(folder):
    rows = {"train": [], "test": []}                          # groups 24, 25: the validation set
    for k in range(ITEMS):
        name, label = (("Archery", 1), ("YoYo", 2))[k % 2]
        for split, group in (("test", 1 + k), ("train", 8 + k), ("train", 24)):
            file = f"{name}/v_{name}_g{group:02d}_c{k + 1:02d}.avi"
            link(folder, k, f"UCF-101/{file}")
            rows[split].append(f"{file} {label}" if split == "train" else file)
    text(folder / "ucfTrainTestlist/classInd.txt", "1 Archery", "2 YoYo")
    for split, fold in itertools.product(rows, (1, 2, 3)):
        text(folder / f"ucfTrainTestlist/{split}list0{fold}.txt", *rows[split])


def hmdb51(folder):
    for name in ("brush_hair", "wave"):
        rows = []
        for k, code in itertools.product(range(ITEMS), (1, 2)):
            file = f"film{k}{code}_{name}_f_cm_np1_fr_med_{k}.avi"
            rows.append(f"{file} {code} ")
            link(folder, k, f"hmdb51_org/{name}/{file}")
        for fold in (1, 2, 3):
            text(folder / f"testTrainMulti_7030_splits/{name}_test_split{fold}.txt", *rows)


def oops(folder):
    times = {}
    for split in ("train", "val"):
        names = [f"{split} fail {k}" for k in range(ITEMS)]
        text(folder / f"annotations/{split}.txt", *names)
        for k, name in enumerate(names):
            link(folder, k, f"oops_video/{split}/{name}.mp4")
            t = [2 + k / 4 + j / 10 for j in range(3)]
            times[name] = {"t": t, "len": SECONDS, "rel_t": [x / SECONDS for x in t],
                           "stdev": 0.1, "rel_stdev": 0.01, "n_notfound": 0}
    text(folder / "annotations/transition_times.json", json.dumps(times))
    fourth = {name: {"t": x["t"][:1]} for name, x in times.items() if name.startswith("val")}
    text(folder / "annotations/heldout_transition_times.json", json.dumps(fourth))


def kinetics400(folder):
    for split, subset in (("train", "train"), ("val", "validate")):
        rows = []
        for k in range(ITEMS):
            label, video = ("abseiling", "climbing a rope")[k % 2], f"{split:->10}{k}"
            rows.append(f"{label},{video},0,10,{subset}")
            link(folder, k, f"{split}/{label.replace(' ', '_')}/{video}_000000_000010.mp4")
        text(folder / f"{split}.csv", "label,youtube_id,time_start,time_end,split", *rows)
    text(folder / "labels.txt", "abseiling", "climbing a rope")


def charades(folder):
    for split in ("train", "test"):
        rows = []
        for k in range(ITEMS):
            name = f"{split[:2].upper()}0{k:02d}"
            rows.append(f"{name},c00{k % 3} 0.50 {2 + k / 2:.2f};c001 {k / 2:.2f} 7.00,8.40")
            link(folder, k, f"Charades_v1/{name}.mp4")
        text(folder / f"Charades/Charades_v1_{split}.csv", "id,actions,length", *rows)
    text(folder / "Charades/Charades_v1_classes.txt", "c000 Hold", "c001 Take", "c002 Throw")


def multithumos(folder):
    names = [f"video_{s}_00000{k:02d}" for s in ("validation", "test") for k in range(ITEMS)]
    for n, name in enumerate(names):
        link(folder, n % ITEMS, f"videos/{name}.mp4")
    text(folder / "class_list.txt", "1 BaseballPitch", "2 Run", "3 Jump")
    for c, word in enumerate(("BaseballPitch", "Run", "Jump")):
        text(folder / f"annotations/{word}.txt", *(
            f"{name} {0.5 + c:.1f} {2.5 + n % ITEMS / 4 + c:.1f}" for n, name in enumerate(names)))
