"""A paragraph in each of some languages, written for these tests, and texts in none."""

from __future__ import annotations

PARAGRAPHS = {
    "en": (
        "The old mill stood at the edge of the village, and nobody had used it for many years. In the spring "
        "the children came to play there, because the water was cool and the trees gave shade. They built "
        "small boats of bark."
    ),
    "de": (
        "Die alte Mühle stand am Rand des Dorfes, und seit vielen Jahren hatte niemand sie benutzt. Im "
        "Frühling kamen die Kinder zum Spielen dorthin, weil das Wasser kühl war und die Bäume Schatten "
        "gaben. Sie bauten kleine Boote."
    ),
    "fr": (
        "Le vieux moulin se trouvait au bord du village, et personne ne s'en était servi depuis de longues "
        "années. Au printemps, les enfants venaient y jouer, parce que l'eau était fraîche et que les arbres "
        "donnaient de l'ombre."
    ),
    "es": (
        "El viejo molino estaba al borde del pueblo y nadie lo había usado desde hacía muchos años. En "
        "primavera los niños venían a jugar allí, porque el agua era fresca y los árboles daban sombra. "
        "Construían pequeños barcos de corteza."
    ),
    "ru": (
        "Старая мельница стояла на краю деревни, и много лет ею никто не пользовался. Весной туда приходили "
        "играть дети, потому что вода была прохладной, а деревья давали тень. Они строили маленькие лодки из "
        "коры."
    ),
    "zh": (
        "村边有一座旧磨坊，已经很多年没有人用过了。春天的时候，孩子们到那里去玩，因为水很凉，树又有阴影。他们"
        "用树皮做小船，放在水里，看谁的船走得最远。"
    ),
    "ja": (
        "村のはずれに古い水車小屋がありました。もう何年も誰も使っていませんでした。春になると、水が冷たくて木"
        "陰もあるので、子どもたちがそこへ遊びに来ました。"
    ),
    "ar": (
        "كانت الطاحونة القديمة تقف عند طرف القرية، ولم يستعملها أحد منذ سنوات طويلة. وفي الربيع كان الأطفال "
        "يأتون للعب هناك، لأن الماء كان باردا والأشجار تعطي الظل."
    ),
    "el": (
        "Ο παλιός μύλος βρισκόταν στην άκρη του χωριού και κανείς δεν τον είχε χρησιμοποιήσει για πολλά "
        "χρόνια. Την άνοιξη έρχονταν τα παιδιά να παίξουν εκεί, γιατί το νερό ήταν δροσερό."
    ),
    "pl": (
        "Stary młyn stał na skraju wsi i od wielu lat nikt z niego nie korzystał. Wiosną przychodziły tam "
        "bawić się dzieci, bo woda była chłodna, a drzewa dawały cień. Budowały małe łódki z kory."
    ),
}

MIXED = f"{PARAGRAPHS['en']}\n{PARAGRAPHS['de']}"
CODE = "for (int i = 0; i < n; ++i) {\n    total += values[i] * weights[i];\n}\nreturn total / n;\n"
NO_LANGUAGE = {"digits": "12 34 56 78 90", "signs": "?! -- ... ***", "blank": " \n\t"}
